"""What a scheme costs on disk, before anything is written."""

from __future__ import annotations

import torch

from llmopt.quantization.scheme import Scheme

_WORD_BITS = 32


def stored_bits_per_weight(
    scheme: Scheme,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    *,
    zero_points: bool = False,
    group_index: bool = False,
) -> float:
    """Bits a weight of ``shape (out, in)`` takes, with scales, zero points and group index.

    Codes and zero points are packed into 32-bit words, rows padded to whole words.
    ``zero_points`` and ``group_index`` say that the format stores them for every scheme.

    Raises:
        BadInputError: if the group size does not divide ``in``.
    """
    rows, columns = shape
    groups = columns // scheme.columns_per_group(columns)
    bits = rows * _packed_bits(columns, scheme.bits)
    bits += rows * groups * scale_dtype.itemsize * 8
    if zero_points or not scheme.symmetric:
        bits += groups * _packed_bits(rows, scheme.bits)
    if group_index or scheme.activation_order == "group":
        bits += columns * 32
    return bits / (rows * columns)


def _packed_bits(count: int, bits: int) -> int:
    return -(-count * bits // _WORD_BITS) * _WORD_BITS
