"""The layout of the Triton kernel of ``linear_w4a16``: into it, and out of it.

A row is cut into chunks and a chunk into planes of ``plane`` columns, as many as codes fit into 16
bits (four of 4 bits, two of 8). A 16-bit half word holds the same column of every plane, the first
plane in the lowest bits, and two neighbouring columns share a word of 32::

    bits      31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0      (4 bits)
    plane     3        2        1        0        3        2        1        0
    column    2i + 1   2i + 1   2i + 1   2i + 1   2i       2i       2i       2i

so that ``(word >> 4 * p) & 0x000F000F`` is a pair of neighbours of plane ``p``, where a matrix unit
wants them: no shuffles. A plane lies in one group, which is why groups are multiples of 32 columns.
Chunks come first in memory, then rows: what a program reads at a time is one contiguous block.
Rows and columns are padded to whole tiles, so that the kernel needs no masks on the weight.

Act-order (``group_index``) becomes a permutation of the columns that brings every group together.
The input's columns are brought into the same order before the launch: the kernel would gather
single elements from them, once for every tile of rows, where now it copies 64 bytes and more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmopt_kernels.packed_weight import PackedWeight, pack_codes, unpack_codes

BITS = (4, 8)
PLANES = (64, 32)
"""Columns of a plane: the first that divides the group size."""

ROW_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class GpuWeight:
    """A quantized weight of logical shape ``(out, in)`` in the kernel's layout.

    Attributes:
        packed: ``(chunks, padded out, plane / 2) int32``.
        bits: width of a code.
        out_features: rows, without padding.
        in_features: columns, without padding.
        scales: ``(groups, padded out)``.
        zero_points: ``(groups / 4, padded out) int32``, four groups a word, the first in the lowest
            byte; ``None`` means ``2**(bits - 1)`` everywhere.
        column_order: ``(in,) int64``, the column of the weight that lies at each place here;
            ``None`` means that all are where they were.
    """

    packed: Tensor
    bits: int
    out_features: int
    in_features: int
    scales: Tensor
    zero_points: Tensor | None = None
    column_order: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // int(self.scales.shape[0])

    @property
    def plane(self) -> int:
        """Columns of a plane."""
        return int(self.packed.shape[2]) * 2

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return self.plane * (16 // self.bits)


def gpu_weight_refusal(weight: PackedWeight) -> str | None:
    """Why the kernel cannot hold ``weight``; ``None`` if it can."""
    if weight.bits not in BITS:
        return f"{weight.bits} bits"
    groups = int(weight.scales.shape[1])
    if weight.in_features % groups or weight.group_size % PLANES[-1]:
        return f"{groups} groups in {weight.in_features} columns, not a multiple of 32 each"
    if weight.group_index is not None:
        sizes = torch.bincount(weight.group_index, minlength=groups)
        if not bool((sizes == weight.group_size).all()):
            return "groups of unequal size"
    return None


def to_gpu_weight(weight: PackedWeight) -> GpuWeight:
    """Lay ``weight`` out for the kernel, on its own device.

    Raises:
        ValueError: if ``gpu_weight_refusal`` has a reason.
    """
    if refusal := gpu_weight_refusal(weight):
        raise ValueError(f"the kernel of linear_w4a16 cannot hold this weight: {refusal}")
    plane = next(plane for plane in PLANES if weight.group_size % plane == 0)
    planes = 16 // weight.bits
    more_rows = -weight.out_features % ROW_MULTIPLE
    codes = unpack_codes(weight.packed, weight.bits, weight.in_features)
    order = None
    if weight.group_index is not None:
        order = torch.argsort(weight.group_index, stable=True)
        codes = codes[:, order]
    codes = pad(codes, (0, -weight.in_features % (plane * planes), 0, more_rows))
    by_plane = codes.view(codes.shape[0], -1, planes, plane).transpose(0, 1)
    halves = torch.zeros_like(by_plane[:, :, 0], dtype=torch.int16)
    for index in range(planes):
        halves |= by_plane[:, :, index].to(torch.int16) << index * weight.bits
    zeros = weight.zero_points
    return GpuWeight(
        packed=halves.contiguous().view(torch.int32),
        bits=weight.bits,
        out_features=weight.out_features,
        in_features=weight.in_features,
        scales=pad(weight.scales, (0, 0, 0, more_rows)).T.contiguous(),
        zero_points=None if zeros is None else _four_a_word(pad(zeros, (0, 0, 0, more_rows))),
        column_order=order,
    )


def from_gpu_weight(weight: GpuWeight, start: int = 0, stop: int | None = None) -> PackedWeight:
    """Rows ``start .. stop`` of the same weight in the plain layout, exactly."""
    last = weight.out_features if stop is None else min(stop, weight.out_features)
    rows = slice(start, last)
    halves = weight.packed[:, rows].contiguous().view(torch.int16)
    mask = (1 << weight.bits) - 1
    by_plane = [
        (halves >> index * weight.bits & mask).to(torch.uint8) for index in range(16 // weight.bits)
    ]
    codes = torch.stack(by_plane, 2).transpose(0, 1).flatten(1)[:, : weight.in_features]
    group_index = None
    if weight.column_order is not None:
        places = torch.empty_like(codes)
        places[:, weight.column_order] = codes
        codes = places
        group_index = torch.empty(weight.in_features, dtype=torch.int32, device=codes.device)
        groups = torch.arange(weight.in_features, dtype=torch.int32, device=codes.device)
        group_index[weight.column_order] = groups // weight.group_size
    zeros = weight.zero_points
    if zeros is not None:
        # Not contiguous(): a single row may keep its stride, and then has no view as bytes.
        words = zeros[:, rows].T.clone(memory_format=torch.contiguous_format)
        zeros = words.view(torch.uint8)[:, : weight.scales.shape[0]].contiguous()
    return PackedWeight(
        packed=pack_codes(codes, weight.bits),
        bits=weight.bits,
        in_features=weight.in_features,
        scales=weight.scales[:, rows].T.contiguous(),
        zero_points=zeros,
        group_index=group_index,
    )


def _four_a_word(zero_points: Tensor) -> Tensor:
    """``(out, groups) uint8`` to ``(groups / 4, out) int32``: asynchronous copies move words."""
    words = pad(zero_points, (0, -zero_points.shape[1] % 4)).contiguous().view(torch.int32)
    return words.T.contiguous()
