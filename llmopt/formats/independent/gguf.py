"""GGUF read by the ``gguf`` package alone: its reader, its numpy dequantization.

Independent of everything that writes: no code of :mod:`llmopt.formats.gguf` or of
:mod:`llmopt.quantization.ggml` is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import ReaderTensor

_CHUNK_ROW_BYTES = 1 << 24


class GGUFDecoder:
    """A file's tensors as float32.

    Args:
        path: of the file.

    Raises:
        ValueError: whatever the package says of a file that it cannot read.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    @property
    def names(self) -> frozenset[str]:
        """All tensors."""
        return frozenset(self._tensors)

    def digest(self, name: str) -> str:
        """SHA-256 over a tensor's float32 values (little-endian), row after row."""
        digest = hashlib.sha256()
        for values in _decoded(self._tensors[name]):
            digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
        return digest.hexdigest()


def _decoded(tensor: ReaderTensor) -> Iterator[np.ndarray]:
    """Its values, some rows at a time."""
    from gguf import dequantize

    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    step = max(1, _CHUNK_ROW_BYTES // max(1, rows.shape[1] * rows.itemsize))
    for start in range(0, len(rows), step):
        # Bytes that are not what was solved may stand for NaN or infinity; digests tell.
        with np.errstate(all="ignore"):
            values = dequantize(rows[start : start + step], tensor.tensor_type)
        yield values
