"""Codes of 2, 3, 4 or 8 bits packed densely into 32-bit words, least significant bit first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_WORD_CODES = 32  # this many codes fill a whole number of words at any width


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """``(rows, n) uint8`` codes to ``(rows, ceil(n * bits / 32)) int32``.

    Code ``i`` starts at bit ``i * bits`` of its row; at 3 bits some codes straddle two words. The
    bits behind a row's last code are zero.
    """
    rows, count = codes.shape
    words = -(-count * bits // 32)
    padded = pad(codes, (0, -count % _WORD_CODES))
    if bits == 8:
        stream = padded
    elif bits == 3:
        stream = _eights_to_bytes(padded.view(rows, -1, 8))
    else:
        per_byte = padded.view(rows, -1, 8 // bits)
        stream = per_byte[..., 0].clone()
        for index in range(1, 8 // bits):
            stream |= per_byte[..., index] << (index * bits)
    # Little-endian: the first byte of a word is its lowest, as on every machine torch runs on.
    # Flattened first: contiguous() leaves odd strides where a dimension is 1.
    return stream.reshape(-1).view(torch.int32).view(rows, -1)[:, :words].contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_rows`: ``(rows, count) uint8``."""
    rows, words = packed.shape
    whole = pad(packed, (0, -words % 3)) if bits == 3 else packed
    # Flattened first: contiguous() leaves odd strides where a dimension is 1.
    stream = whole.reshape(-1).view(torch.uint8).view(rows, -1)
    if bits == 8:
        codes = stream
    elif bits == 3:
        codes = _bytes_to_eights(stream.view(rows, -1, 3))
    else:
        shifts = range(0, 8, bits)
        codes = torch.stack([(stream >> shift) & ((1 << bits) - 1) for shift in shifts], dim=-1)
    return codes.reshape(rows, -1)[:, :count].contiguous()


def _eights_to_bytes(eights: Tensor) -> Tensor:
    """Eight 3-bit codes to three bytes: ``(rows, n, 8) uint8`` to ``(rows, 3n) uint8``."""
    value = eights[..., 0].to(torch.int32)
    for index in range(1, 8):
        value |= eights[..., index].to(torch.int32) << (3 * index)
    three = torch.stack([(value >> shift) & 0xFF for shift in (0, 8, 16)], dim=-1)
    return three.to(torch.uint8).flatten(1)


def _bytes_to_eights(three: Tensor) -> Tensor:
    low, middle, high = three.to(torch.int32).unbind(-1)
    value = low | middle << 8 | high << 16
    return torch.stack([(value >> (3 * index)) & 7 for index in range(8)], dim=-1).to(torch.uint8)
