"""A position in a file's bytes that cannot leave them: every count is held against what is left."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np

from llmopt.errors import BadInputError
from llmopt.formats.gguf.values import NUMBER_DTYPES, PlainValue, ValueType

MAX_HEADER_BYTES = 1 << 28
"""256 MiB: above ten times the largest vocabulary's; what stands before the tensors' bytes."""

_FETCH_AGAIN = "download or convert the file again; its checksum stands on the model's page"


def unsound(path: Path, where: str, what: str) -> BadInputError:
    """The error for bytes that make no sense."""
    return BadInputError(f"{path} is not a sound GGUF file: {where}: {what}", _FETCH_AGAIN)


class Cursor:
    """Reads little-endian GGUF values one after the other.

    Args:
        path: for messages.
        data: the whole file.

    Attributes:
        offset: the next byte to read.
        where: what is being read, for messages.
    """

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self._path = path
        self._data = data
        self._limit = min(len(data), MAX_HEADER_BYTES)
        self.offset = 0
        self.where = "header"

    @property
    def place(self) -> str:
        """What is being read, and where."""
        return f"{self.where} (byte {self.offset})"

    def fail(self, what: str) -> BadInputError:
        """The error for what stands here."""
        return unsound(self._path, self.place, what)

    def require(self, count: int, size: int, what: str) -> None:
        """Holds `count` things of at least `size` bytes each against the bytes that are left."""
        left = self._limit - self.offset
        if count * size > left:
            end = "the file ends" if self._limit == len(self._data) else "256 MiB of header end"
            raise self.fail(f"{what} needs {count * size} bytes, and {end} after {left}")

    def uint32(self) -> int:
        """The next four bytes."""
        return int(self._unpack("<I", 4))

    def uint64(self) -> int:
        """The next eight bytes."""
        return int(self._unpack("<Q", 8))

    def string(self, what: str) -> str:
        """A length and as many bytes of UTF-8."""
        length = self.uint64()
        self.require(length, 1, f"{what} of {length} bytes")
        raw = self._data[self.offset : self.offset + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = f"{error.reason} at its byte {error.start}"
            raise self.fail(f"{what} is not UTF-8 ({at})") from error
        self.offset += length
        return text

    def value_type(self) -> ValueType:
        """The number of a value type."""
        number = self.uint32()
        try:
            return ValueType(number)
        except ValueError:
            raise self.fail(f"there is no metadata type {number}") from None

    def value(self, kind: ValueType) -> PlainValue:
        """A value of this type."""
        if kind is ValueType.STRING:
            return self.string("a text")
        if kind is ValueType.ARRAY:
            return self._array()
        number: int | float | bool = self._numbers(kind, 1)[0].item()
        return number

    def _array(self) -> PlainValue:
        kind = self.value_type()
        count = self.uint64()
        if kind in NUMBER_DTYPES:
            return self._numbers(kind, count)
        if kind is ValueType.ARRAY:
            # Each empty one costs a file twelve bytes and a reader an object.
            raise self.fail(f"an array of {count} arrays; llama.cpp reads no array in an array")
        self.require(count, 8, f"an array of {count}")  # the least that a text takes: its length
        return tuple(self.string("a text") for _ in range(count))

    def _numbers(self, kind: ValueType, count: int) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
        dtype = NUMBER_DTYPES[kind]
        self.require(count, dtype.itemsize, f"an array of {count}" if count != 1 else "a number")
        size = count * dtype.itemsize
        raw = self._data[self.offset : self.offset + size]
        if kind is ValueType.BOOL and raw.strip(b"\x00\x01"):
            raise self.fail("a boolean is neither 0 nor 1")
        self.offset += size
        return np.frombuffer(raw, dtype=dtype)

    def _unpack(self, form: str, size: int) -> int:
        self.require(1, size, "a number")
        (number,) = struct.unpack_from(form, self._data, self.offset)
        self.offset += size
        return int(number)
