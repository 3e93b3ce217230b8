"""The header of a safetensors file, parsed without trust.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header,
tensor bytes without holes).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from llmopt.errors import BadInputError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
METADATA_KEY = "__metadata__"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_FETCH_AGAIN = "download the file again; its checksum stands on the model's page"
_LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies: ``offset`` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The places of all tensors of a file, in the order of their bytes.

    Raises:
        BadInputError: if the file is truncated, has bytes to spare, or its header is not sound
            (length, JSON, dtypes, shapes, offsets with holes or overlaps).
    """
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(8)
            if len(prefix) == 8 and _LFS_MAGIC.startswith(prefix):
                raise BadInputError(
                    f"{path} is a git-lfs pointer, not the weights", "run `git lfs pull` there"
                )
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + header_bytes > file_bytes:
                raise BadInputError(
                    f"{path} is truncated or not safetensors: it has {file_bytes} bytes, and its "
                    f"header alone claims {header_bytes}",
                    _FETCH_AGAIN,
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise _unsound(path, f"a header of {header_bytes} bytes")
            raw = file.read(header_bytes)
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    entries = _parse_json(path, raw)
    places = {
        name: _parse_place(path, name, entry, 8 + header_bytes)
        for name, entry in entries.items()
        if name != METADATA_KEY
    }
    ordered = sorted(places.items(), key=lambda item: (item[1].offset, item[1].num_bytes))
    _check_layout(path, ordered, 8 + header_bytes, file_bytes)
    return dict(ordered)


def _unsound(path: Path, what: str) -> BadInputError:
    return BadInputError(f"{path} has an unsound safetensors header: {what}", _FETCH_AGAIN)


def _parse_json(path: Path, raw: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise _unsound(path, "a key stands twice")
        return entries

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _unsound(path, f"not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _unsound(path, "not a JSON object")
    return entries


def _parse_place(path: Path, name: str, entry: object, data_begin: int) -> TensorPlace:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _unsound(path, f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype_name = entry["dtype"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise BadInputError(
            f"{path}: tensor {name!r} has the dtype {dtype_name!r}, which llmopt does not read",
            "start from a checkpoint in one of " + ", ".join(DTYPES),
        )
    shape, offsets = _naturals(entry["shape"]), _naturals(entry["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _unsound(path, f"tensor {name!r} has bad offsets")
    # An empty tensor's other dimensions are bound too: torch multiplies them in 64 bits.
    if shape is None or math.prod(max(1, size) for size in shape) >= 1 << 59:
        raise _unsound(path, f"tensor {name!r} has a bad shape")
    dtype = DTYPES[dtype_name]
    num_bytes = offsets[1] - offsets[0]
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise _unsound(
            path, f"tensor {name!r}: {num_bytes} bytes do not hold {dtype_name} {list(shape)}"
        )
    return TensorPlace(dtype, shape, data_begin + offsets[0], num_bytes)


def _naturals(value: object) -> tuple[int, ...] | None:
    """The value as a tuple of few integers of 0 to 63 bits, or none."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    # `type is int`, since JSON's true is an int to isinstance
    if not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return None
    return tuple(value)


def _check_layout(
    path: Path, ordered: list[tuple[str, TensorPlace]], data_begin: int, file_bytes: int
) -> None:
    end = data_begin
    for name, place in ordered:
        if place.offset != end:
            kind = "overlaps the one before it" if place.offset < end else "has a hole before it"
            raise _unsound(path, f"tensor {name!r} {kind}")
        end += place.num_bytes
    if file_bytes < end:
        raise BadInputError(
            f"{path} is truncated: its header declares {end} bytes, it has {file_bytes}",
            _FETCH_AGAIN,
        )
    if file_bytes > end:
        raise _unsound(path, f"{file_bytes - end} bytes after the last tensor")
