"""Codes of 2, 3, 4 or 8 bits packed without gaps, and the weight they mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``(out, in) uint8`` to ``(out, ceil(in / 8) * bits) uint8``.

    Eight codes take ``bits`` bytes, the first code in the lowest bits of the first byte; for four
    bits that is two codes a byte, the even column low. Columns past ``in`` are zero.
    """
    _check_bits(bits)
    out_features, in_features = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -in_features % 8))
    eights = padded.view(out_features, -1, 8).to(torch.int64)
    shifts = torch.arange(8, device=codes.device) * bits
    # Sums stay below 2**64 and codes do not share bits; bit 63 makes the word negative, no more.
    words = (eights << shifts).sum(-1).contiguous()
    return words.view(torch.uint8).view(out_features, -1, 8)[..., :bits].reshape(out_features, -1)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of ``pack_codes``: ``(out, in) uint8``."""
    _check_bits(bits)
    out_features = packed.shape[0]
    if bits == 8:
        return packed[:, :in_features]
    if bits == 3:
        triples = packed.view(out_features, -1, 3).to(torch.int32)
        words = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        shifts = torch.arange(8, device=packed.device, dtype=torch.int32) * 3
        codes = (words[..., None] >> shifts & 7).to(torch.uint8)
    else:
        shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
        codes = packed[..., None] >> shifts & ((1 << bits) - 1)
    return codes.reshape(out_features, -1)[:, :in_features]


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits: only {BITS} are packed")


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized weight of logical shape ``(out, in)``.

    Attributes:
        packed: ``pack_codes`` of the codes.
        bits: width of a code.
        in_features: columns.
        scales: ``(out, groups)``.
        zero_points: ``(out, groups) uint8``; ``None`` means ``2**(bits - 1)`` everywhere.
        group_index: ``(in,) int32``, the group of each column; ``None`` means equal groups of
            neighbouring columns.
    """

    packed: Tensor
    bits: int
    in_features: int
    scales: Tensor
    zero_points: Tensor | None = None
    group_index: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.packed.shape[0])

    @property
    def group_size(self) -> int:
        """Columns of one group (of neighbours, when there is no group index)."""
        return self.in_features // int(self.scales.shape[1])

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start .. stop`` as ``(code - zero point) * scale``, ``(stop - start, in) dtype``.

        Formed in float32 (float64 for float64) and rounded once.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = slice(start, stop)
        codes = unpack_codes(self.packed[rows], self.bits, self.in_features).to(wide)
        scales = self.scales[rows].to(wide)
        zeros: Tensor | float = float(1 << (self.bits - 1))
        if self.zero_points is not None:
            zeros = self.zero_points[rows].to(wide)
        if self.group_index is not None:
            columns = self.group_index.long()
            zeros = zeros[:, columns] if isinstance(zeros, Tensor) else zeros
            return ((codes - zeros) * scales[:, columns]).to(dtype)
        grouped = codes.reshape(codes.shape[0], scales.shape[1], -1)
        zeros = zeros[..., None] if isinstance(zeros, Tensor) else zeros
        return ((grouped - zeros) * scales[..., None]).reshape(codes.shape).to(dtype)
