"""GGUF read by the ``gguf`` package alone: its reader, its numpy dequantization.

Independent of everything that writes: no code of :mod:`llmopt.formats.gguf` or of
:mod:`llmopt.quantization.ggml` is used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_CHUNK_ROW_BYTES = 1 << 24
_Order = np.ndarray[tuple[int], np.dtype[np.intp]]

# Architectures whose graph rotates neighbouring rows (LLAMA_ROPE_TYPE_NORM in llama.cpp's
# src/llama-model.cpp), of those that llmopt writes; the others rotate one half of a head against
# the other, as checkpoints do.
_ROTATE_NEIGHBOURS = ("llama", "smollm3")
_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


class GGUFDecoder:
    """A file's tensors as float32.

    Args:
        path: of the file.

    Raises:
        ValueError: whatever the package says of a file that it cannot read.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._heads = _heads_of_neighbours(reader)

    @property
    def names(self) -> frozenset[str]:
        """All tensors."""
        return frozenset(self._tensors)

    def digest(self, name: str) -> str:
        """SHA-256 over a tensor's float32 values (little-endian), row after row.

        The rows of q and k are taken in the checkpoint's order, by what the file says of its
        architecture and heads.
        """
        tensor, found = self._tensors[name], _ROTATED.fullmatch(name)
        order = None
        if found is not None and found.group(1) in self._heads:
            order = _halves(int(tensor.shape[-1]), self._heads[found.group(1)])
        digest = hashlib.sha256()
        for values in _decoded(tensor, order):
            digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
        return digest.hexdigest()


def _heads_of_neighbours(reader: GGUFReader) -> dict[str, int]:
    """Heads of q and of k, where rows that are rotated together lie beside each other."""

    def number(key: str) -> int:
        if key not in reader.fields:
            raise ValueError(f"{key} is missing")
        return int(reader.fields[key].contents())

    if "general.architecture" not in reader.fields:
        raise ValueError("general.architecture is missing")
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in _ROTATE_NEIGHBOURS:
        return {}
    prefix = f"{architecture}.attention.head_count"
    return {"q": number(prefix), "k": number(f"{prefix}_kv")}


def _halves(num_rows: int, heads: int) -> _Order:
    """Rows of the file in the checkpoint's order: of each head the even ones, then the odd ones."""
    if heads <= 0 or num_rows % (2 * heads):
        raise ValueError(f"{num_rows} rows are not {heads} heads of pairs")
    head = np.arange(num_rows).reshape(heads, -1)
    return np.concatenate([head[:, 0::2], head[:, 1::2]], axis=1).reshape(-1)


def _decoded(tensor: ReaderTensor, order: _Order | None) -> Iterator[np.ndarray]:
    """Its values, some rows at a time."""
    from gguf import dequantize

    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    if order is not None and tensor.data.ndim == 1:  # a bias: what is moved are its values
        rows = rows[:, order]
    elif order is not None:
        rows = rows[order]
    step = max(1, _CHUNK_ROW_BYTES // max(1, rows.shape[1] * rows.itemsize))
    for start in range(0, len(rows), step):
        # Bytes that are not what was solved may stand for NaN or infinity; digests tell.
        with np.errstate(all="ignore"):
            values = dequantize(rows[start : start + step], tensor.tensor_type)
        yield values
