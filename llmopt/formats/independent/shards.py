"""Safetensors bytes and streams of bits, read with numpy alone, one bit at a time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmopt.errors import RoundTripError

_DTYPES = {"I32": "<i4", "I64": "<i8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BIT_ELEMENTS = 1 << 24  # bits expanded to a byte each at once


@dataclass(frozen=True, slots=True)
class DecodedWeight:
    """Codes ``(out, in) uint8``, scales ``(out, groups) float32``, zero points and group index."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    group_index: NDArray[np.int32] | None

    def digest(self) -> str:
        """The SHA-256 that ``QuantizedTensor.digest`` gives for the same content."""
        digest = hashlib.sha256()
        for array in (self.codes, self.scales, self.zero_points, self.group_index):
            if array is None:
                digest.update(b"none")
            else:
                digest.update(f"torch.{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class RawShards:
    """The tensors of some safetensors files, read from their bytes.

    Raises:
        RoundTripError: if a header cannot be right, or two files hold the same name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._entries: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        for file in files:
            self._read_header(file)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in file order."""
        return tuple(self._entries)

    def modules_with(self, part: str) -> tuple[str, ...]:
        """The modules that have a tensor ``part``, in file order."""
        suffix = f".{part}"
        return tuple(name.removesuffix(suffix) for name in self._entries if name.endswith(suffix))

    def tensor(self, name: str) -> NDArray[np.generic]:
        """One tensor; bfloat16 comes back as float32, all else as stored."""
        if name not in self._entries:
            raise broken(f"{name} is not in the files")
        file, kind, shape, start, stop = self._entries[name]
        with file.open("rb") as handle:
            handle.seek(start)
            data = handle.read(stop - start)
        array = np.frombuffer(data, dtype=_DTYPES[kind])
        if array.size != int(np.prod(shape)):
            raise broken(f"{name} has {array.size} elements for shape {shape}")
        if kind == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(shape)

    def _read_header(self, file: Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if name in self._entries or stop > size:
                raise broken(f"{name} stands twice or reaches past the end of {file.name}")
            self._entries[name] = (file, entry["dtype"], tuple(entry["shape"]), start, stop)


def expand(words: NDArray[np.generic], bits: int, count: int) -> NDArray[np.uint8]:
    """``(rows, words) int32`` to ``(rows, count) uint8``: code ``i`` starts at bit ``i * bits``.

    Raises:
        RoundTripError: if the words cannot hold so many codes.
    """
    rows, width = words.shape
    if width * 32 < count * bits:
        raise broken(f"{width} words cannot hold {count} codes of {bits} bits")
    values = (1 << np.arange(bits)).astype(np.uint8)
    codes = np.empty((rows, count), dtype=np.uint8)
    chunk = max(1, _BIT_ELEMENTS // (width * 32))
    for start in range(0, rows, chunk):
        data = np.ascontiguousarray(words[start : start + chunk]).astype("<i4").view(np.uint8)
        stream = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits]
        codes[start : start + chunk] = stream.reshape(-1, count, bits) @ values
    return codes


def broken(what: str) -> RoundTripError:
    """What is on disk is not what it should be."""
    return RoundTripError(
        what, "the written checkpoint is not what was meant; please report this as a defect"
    )
