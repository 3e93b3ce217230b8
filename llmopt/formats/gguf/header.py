"""What stands before the tensors' bytes of a GGUF file, parsed without trust.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian:
magic, version, number of tensors, number of metadata values; the metadata; the tensors' names,
dimensions, types and offsets; padding; the tensors' bytes. Nothing is allocated for a count or a
length before it is held against the bytes that are left.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmopt.errors import BadInputError
from llmopt.formats.gguf.cursor import Cursor, unsound
from llmopt.formats.gguf.values import PlainValue, ValueType
from llmopt.quantization.ggml.types import GGML_TYPES, GGML_TYPES_BY_ID, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 63  # ggml keeps a name in 64 bytes
_LEAST_VALUE_BYTES = 8 + 4 + 1  # of a metadata value: length of its key, type, one byte
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # of a tensor's entry, with one dimension
_LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where and what a tensor is.

    Attributes:
        name: llama.cpp's: ``blk.3.attn_q.weight``.
        type: how its values are stored.
        shape: as torch has it, the row's width last: ``(out, in)``, ``(experts, out, in)``.
        offset: of its first byte, from the beginning of the file.
        num_bytes: of its values, without padding.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // self.type.block_size * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """All that a file says before its tensors' bytes.

    Attributes:
        version: of the format.
        metadata: the values, in the file's order.
        value_offsets: where each value's bytes begin, from the beginning of the file; of a text,
            where its length stands.
        value_types: the type of each value.
        tensors: by name, in the order of their bytes.
        data_offset: where the tensors' bytes begin.
    """

    version: int
    metadata: Mapping[str, PlainValue]
    value_offsets: Mapping[str, int]
    value_types: Mapping[str, ValueType]
    tensors: Mapping[str, GGUFTensorInfo]
    data_offset: int


def parse_header(path: Path, data: mmap.mmap | bytes) -> Header:
    """Parse a file's beginning.

    Args:
        path: for messages.
        data: the whole file, mapped.

    Raises:
        BadInputError: another format, version or byte order; a count, length, offset or dimension
            that the file cannot hold; a name or key that stands twice; a type that llmopt does
            not read; tensors that overlap, lie off their alignment or outside the file.
    """
    cursor = Cursor(path, data)
    version = _read_version(path, data, cursor)
    num_tensors, num_values = cursor.uint64(), cursor.uint64()
    cursor.require(num_values, _LEAST_VALUE_BYTES, f"a count of {num_values} metadata values")
    metadata: dict[str, PlainValue] = {}
    offsets: dict[str, int] = {}
    types: dict[str, ValueType] = {}
    for index in range(num_values):
        cursor.where = f"metadata value {index + 1} of {num_values}"
        key = cursor.string("a key")
        cursor.where = f"metadata value {index + 1} of {num_values}, {key[:80]!r}"
        if key in metadata:
            raise cursor.fail("the key stands twice")
        types[key] = cursor.value_type()
        offsets[key] = cursor.offset
        metadata[key] = cursor.value(types[key])
    alignment = _read_alignment(path, metadata, types)
    cursor.where = "tensor list"
    cursor.require(num_tensors, _LEAST_TENSOR_BYTES, f"a count of {num_tensors} tensors")
    found = [
        _read_tensor(path, cursor, f"{index + 1} of {num_tensors}") for index in range(num_tensors)
    ]
    data_offset = -(-cursor.offset // alignment) * alignment
    tensors = _place(path, found, data_offset, alignment, len(data))
    return Header(version, metadata, offsets, types, tensors, data_offset)


def _read_version(path: Path, data: mmap.mmap | bytes, cursor: Cursor) -> int:
    start = data[: len(MAGIC)]
    if start != MAGIC:
        if data[: len(_LFS_MAGIC)] == _LFS_MAGIC:
            raise BadInputError(
                f"{path} is a git-lfs pointer, not the model", "run `git lfs pull` there"
            )
        raise BadInputError(
            f"{path} is not a GGUF file: it begins with {start!r}, not with {MAGIC!r}",
            "give a .gguf file (the old .ggml and .ggjt ones must be converted anew)",
        )
    cursor.offset = len(MAGIC)
    version = cursor.uint32()
    if version in VERSIONS:
        return version
    if version & 0xFFFF == 0:
        raise BadInputError(
            f"{path} was written for machines with the other byte order (big-endian)",
            "convert the model anew without --bigendian, or with gguf-convert-endian",
        )
    raise BadInputError(
        f"{path} is GGUF version {version}; llmopt reads versions 2 and 3",
        "convert the model anew with a current llama.cpp",
    )


def _read_alignment(
    path: Path, metadata: Mapping[str, PlainValue], types: Mapping[str, ValueType]
) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    sound = types.get(ALIGNMENT_KEY, ValueType.UINT32) is ValueType.UINT32
    if not sound or not isinstance(alignment, int) or alignment.bit_count() != 1:
        raise unsound(path, ALIGNMENT_KEY, f"{alignment!r} is not a power of two in 32 bits")
    return alignment


def _read_tensor(path: Path, cursor: Cursor, which: str) -> GGUFTensorInfo:
    """A tensor's entry; its offset still counts from the beginning of the tensors' bytes."""
    cursor.where = f"tensor {which}"
    name = cursor.string("a name")
    cursor.where = f"tensor {which}, {name[:80]!r}"
    if not 0 < len(name.encode()) <= _MAX_NAME_BYTES:
        raise cursor.fail(f"names have 1 to {_MAX_NAME_BYTES} bytes")
    num_dimensions = cursor.uint32()
    if not 0 < num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.fail(f"{num_dimensions} dimensions; a tensor has 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.uint64() for _ in range(num_dimensions))[::-1]
    number = cursor.uint32()
    offset = cursor.uint64()
    if 0 in shape or math.prod(shape) >= 1 << 59:
        raise cursor.fail(f"the shape {list(shape)} is empty or absurd")
    kind = GGML_TYPES_BY_ID.get(number)
    if kind is None:
        raise BadInputError(
            f"{path}: {cursor.place}: {_type_name(number)} is a type that llmopt does not read",
            f"take a file of the types {', '.join(GGML_TYPES)}",
        )
    if shape[-1] % kind.block_size:
        raise cursor.fail(
            f"rows of {shape[-1]} do not divide into {kind.name}'s blocks of {kind.block_size}"
        )
    num_bytes = math.prod(shape) // kind.block_size * kind.block_bytes
    return GGUFTensorInfo(name, kind, shape, offset, num_bytes)


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return f"{GGMLQuantizationType(number).name} ({number})"
    except ValueError:
        return f"number {number}"


def _place(
    path: Path, found: list[GGUFTensorInfo], data_offset: int, alignment: int, file_bytes: int
) -> dict[str, GGUFTensorInfo]:
    """The tensors at their places in the file, by name, in the order of their bytes."""
    placed: dict[str, GGUFTensorInfo] = {}
    end = data_offset
    for info in sorted(found, key=lambda info: info.offset):
        where = f"tensor {info.name[:80]!r}"
        if info.name in placed:
            raise unsound(path, where, "the name stands twice")
        if info.offset % alignment:
            raise unsound(path, where, f"its offset {info.offset} is not aligned to {alignment}")
        offset = data_offset + info.offset
        if offset < end:
            raise unsound(path, where, "it overlaps the tensor before it")
        end = offset + info.num_bytes
        if end > file_bytes:
            raise unsound(
                path, where, f"it ends at byte {end}, and the file at {file_bytes}: it is truncated"
            )
        placed[info.name] = GGUFTensorInfo(info.name, info.type, info.shape, offset, info.num_bytes)
    return placed
