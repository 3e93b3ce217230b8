"""Writes one GGUF file, a tensor at a time, whole and durably or not at all.

The bytes are laid out by the ``gguf`` package's writer (version 3, little-endian, alignment 32).
They go to a temporary name beside the destination, which is renamed onto it once all is on disk.
Two metadata texts of fixed length (:mod:`llmopt.formats.gguf.record`) are there to be overwritten
in place: the hash of the tensors' bytes, known when the last is written, and the verdict, known
after the gate.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmopt.checkpoint.durable import TEMPORARY_SUFFIX, fsync_path, storage_errors
from llmopt.formats.gguf.header import DEFAULT_ALIGNMENT
from llmopt.formats.gguf.record import blank_records, set_tensor_data_hash
from llmopt.formats.gguf.values import TypedValue
from llmopt.quantization.ggml.types import GGMLType

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that is to be written.

    Attributes:
        name: llama.cpp's.
        type: how its values are stored.
        shape: as torch has it, the row's width last.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its packed rows."""
        return torch.Size(self.shape).numel() // self.type.block_size * self.type.block_bytes


def write_gguf(
    path: Path,
    architecture: str | None,
    metadata: Mapping[str, TypedValue],
    tensors: Sequence[TensorEntry],
    packed: Callable[[TensorEntry], Tensor],
    *,
    with_records: bool = True,
) -> str:
    """Write a file; at ``path`` there is nothing, or what was there, until it is whole.

    Args:
        path: of the file.
        architecture: llama.cpp's name, ``general.architecture``; None for a file without a model.
        metadata: all other values, in their order.
        tensors: in the order of their bytes.
        packed: gives a tensor's packed rows, ``(..., row_bytes) uint8``; called once for each
            tensor, in order; no result is kept.
        with_records: add the two texts of :mod:`llmopt.formats.gguf.record`.

    Returns:
        SHA-256 of the tensors' bytes, as in ``llmopt.tensor_data.sha256``.

    Raises:
        StorageError: if the disk refuses; the temporary file is gone.
    """
    temporary = path.parent / f".{path.name}{TEMPORARY_SUFFIX}"
    with storage_errors(f"cannot write {path}"):
        try:
            records = blank_records() if with_records else {}
            writer = _open_writer(temporary, architecture, {**metadata, **records}, tensors)
            try:
                digest = _write_data(writer, tensors, packed)
            finally:
                writer.close()
            if with_records:
                set_tensor_data_hash(temporary, digest)
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return digest


def _open_writer(
    temporary: Path,
    architecture: str | None,
    metadata: Mapping[str, TypedValue],
    tensors: Sequence[TensorEntry],
) -> GGUFWriter:
    """A writer that waits for the tensors' bytes."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(temporary, architecture or "")
    if architecture is None:
        writer.kv_data[0].clear()
    assert writer.data_alignment == DEFAULT_ALIGNMENT
    for key, value in metadata.items():
        element = None if value.element is None else GGUFValueType(value.element)
        writer.add_key_value(key, value.value, GGUFValueType(value.type), element)
    for entry in tensors:
        writer.add_tensor_info(
            entry.name,
            entry.shape,
            np.dtype(np.float32),  # unused where raw_dtype is given and it is not uint8
            entry.num_bytes,
            raw_dtype=GGMLQuantizationType(entry.type.id),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _write_data(
    writer: GGUFWriter,
    tensors: Sequence[TensorEntry],
    packed: Callable[[TensorEntry], Tensor],
) -> str:
    """Write all tensors; returns the hash of their bytes, padding included."""
    digest = hashlib.sha256()
    for entry in tensors:
        _write_tensor(writer, entry, packed(entry), digest)
    return digest.hexdigest()


def _write_tensor(
    writer: GGUFWriter, entry: TensorEntry, rows: Tensor, digest: hashlib._Hash
) -> None:
    assert rows.dtype == torch.uint8, f"{entry.name}: {rows.dtype}"
    assert rows.numel() == entry.num_bytes, f"{entry.name}: {rows.numel()} bytes"
    flat = rows.contiguous().view(-1).cpu().numpy()
    digest.update(flat.data)
    digest.update(bytes(-len(flat) % DEFAULT_ALIGNMENT))
    writer.write_tensor_data(flat)
