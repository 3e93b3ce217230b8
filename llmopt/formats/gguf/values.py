"""Typed metadata values of a GGUF file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (``gguf_metadata_value_type``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

NumberArray: TypeAlias = npt.NDArray[np.generic]
PlainValue: TypeAlias = int | float | bool | str | NumberArray | tuple[str, ...]
"""What a metadata value is in Python: arrays of numbers as numpy's, of strings as tuples."""


class ValueType(IntEnum):
    """The numbers that stand for the types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


NUMBER_DTYPES: dict[ValueType, np.dtype[np.generic]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
"""The element type of each value type that is one number."""


@dataclass(frozen=True, slots=True)
class TypedValue:
    """A metadata value to be written.

    Attributes:
        type: of the value.
        value: a number, a string, or a sequence of numbers or strings.
        element: of an array, the type of its elements.
    """

    type: ValueType
    value: int | float | bool | str | Sequence[int] | Sequence[float] | Sequence[str]
    element: ValueType | None = None


def uint32(value: int) -> TypedValue:
    """A count or length, as llama.cpp wants them."""
    return TypedValue(ValueType.UINT32, value)


def float32(value: float) -> TypedValue:
    """A number with a fraction, as llama.cpp wants them."""
    return TypedValue(ValueType.FLOAT32, value)


def boolean(value: bool) -> TypedValue:
    """A switch."""
    return TypedValue(ValueType.BOOL, value)


def string(value: str) -> TypedValue:
    """A text."""
    return TypedValue(ValueType.STRING, value)


def strings(values: Sequence[str]) -> TypedValue:
    """Several texts; not none, which a file cannot type."""
    return TypedValue(ValueType.ARRAY, tuple(values), ValueType.STRING)


def float32s(values: Sequence[float]) -> TypedValue:
    """Several numbers."""
    return TypedValue(ValueType.ARRAY, tuple(values), ValueType.FLOAT32)


def int32s(values: Sequence[int]) -> TypedValue:
    """Several signed integers."""
    return TypedValue(ValueType.ARRAY, tuple(values), ValueType.INT32)


def booleans(values: Sequence[bool]) -> TypedValue:
    """Several switches."""
    return TypedValue(ValueType.ARRAY, tuple(values), ValueType.BOOL)
