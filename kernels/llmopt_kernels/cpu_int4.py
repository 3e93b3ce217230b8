"""The layout of torch's CPU int4 kernel: into it, out of it, and products from it.

The kernel reads blocks of rows, ``(in, block / 2)`` bytes each, two rows a byte. How many rows make
a block and which two share a byte depends on the processor, so it is learnt by packing a probe.
With it known, one copy of the weight serves small batches (the kernel) and large ones (dequantized
block by block, without leaving the layout).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmopt_kernels.packed_weight import PackedWeight, pack_codes, unpack_codes

GROUP_SIZES = (256, 128, 64, 32)
"""Group sizes that the kernel takes; others that they divide are stored as several equal groups."""

ROW_MULTIPLE = 16
CHUNK_BYTES = 4 << 20
_MIDPOINT = 8
_PROBE_ROWS = 64


@dataclass(frozen=True, slots=True)
class CpuInt4Weight:
    """A 4-bit weight in the kernel's layout.

    Attributes:
        packed: ``(out, in / 2) uint8``, opaque but for this module.
        scales_and_zeros: ``(groups, out, 2)``: ``weight = (code - 8) * scale + zero``.
    """

    packed: Tensor
    scales_and_zeros: Tensor

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.packed.shape[0])

    @property
    def in_features(self) -> int:
        """Columns."""
        return int(self.packed.shape[1]) * 2

    @property
    def group_size(self) -> int:
        """Columns that share a scale in this layout."""
        return self.in_features // int(self.scales_and_zeros.shape[0])


def cpu_int4_refusal(weight: PackedWeight) -> str | None:
    """Why the kernel cannot hold ``weight``; ``None`` if it can."""
    if weight.bits != 4:
        return f"{weight.bits} bits"
    if weight.group_index is not None:
        return "group index"
    if weight.out_features % ROW_MULTIPLE:
        return f"{weight.out_features} rows, not a multiple of {ROW_MULTIPLE}"
    if _kernel_group_size(weight.group_size) is None:
        return f"groups of {weight.group_size} columns"
    return None


def _kernel_group_size(group_size: int) -> int | None:
    return next((size for size in GROUP_SIZES if group_size % size == 0), None)


def to_cpu_int4(weight: PackedWeight, dtype: torch.dtype) -> CpuInt4Weight:
    """Lay ``weight`` out for the kernel, scales and zeros in ``dtype`` (that of the input).

    Raises:
        ValueError: if ``cpu_int4_refusal`` has a reason.
    """
    if refusal := cpu_int4_refusal(weight):
        raise ValueError(f"the CPU int4 kernel cannot hold this weight: {refusal}")
    size = _kernel_group_size(weight.group_size)
    assert size is not None
    codes = unpack_codes(weight.packed, 4, weight.in_features)
    scales = weight.scales.float()
    zeros = torch.zeros_like(scales)
    if weight.zero_points is not None:
        zeros = (_MIDPOINT - weight.zero_points.float()) * scales
    scales_and_zeros = torch.stack([scales, zeros], -1).repeat_interleave(
        weight.group_size // size, 1
    )
    return CpuInt4Weight(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1),
        scales_and_zeros.transpose(0, 1).to(dtype).contiguous(),
    )


def from_cpu_int4(weight: CpuInt4Weight) -> PackedWeight:
    """The same weight in the plain layout (on its own device), as other devices read it.

    Zero points are exact: a zero is a small integer times the scale, so rounding finds it.
    """
    codes = torch.empty(
        weight.out_features, weight.in_features, dtype=torch.uint8, device=weight.packed.device
    )
    for first, block in _blocks(weight):
        rows = codes[first : first + block.shape[0] * block.shape[2] * 2]
        low_high = torch.stack([block & 15, block >> 4], 2)  # (blocks, in, 2, block / 2)
        by_row = rows.view(block.shape[0], -1, weight.in_features)
        by_row[:, _row_order(block.shape[2] * 2).to(codes.device)] = low_high.flatten(2).transpose(
            1, 2
        )
    scales, zeros = weight.scales_and_zeros.unbind(-1)
    zero_points = None
    if zeros.any():
        ratio = torch.where(scales == 0, 0, zeros.float() / scales.float())
        zero_points = (_MIDPOINT - ratio).round().to(torch.uint8).T.contiguous()
    return PackedWeight(
        pack_codes(codes, 4), 4, weight.in_features, scales.T.contiguous(), zero_points
    )


def matmul_kernel(x: Tensor, weight: CpuInt4Weight) -> Tensor:
    """``x (M, in) @ weight^T`` by torch's kernel, ``(M, out)`` in the type of ``x``."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]  # untyped op
        x.contiguous(), weight.packed, weight.group_size, weight.scales_and_zeros.to(x.dtype)
    )


def matmul_dequantized(x: Tensor, weight: CpuInt4Weight, dtype: torch.dtype) -> Tensor:
    """``x (M, in) @ weight^T`` in ``dtype``, dequantized a few blocks of rows at a time."""
    x = x.to(dtype)
    has_zeros = bool(weight.scales_and_zeros[..., 1].any())
    parts = []
    for first, block in _blocks(weight, CHUNK_BYTES // dtype.itemsize):
        count, in_features, half = block.shape
        last = first + count * half * 2
        order = _row_order(half * 2)
        # (groups, blocks, 2, half, 2) -> each (blocks, 2, groups, 1, half)
        factors = weight.scales_and_zeros[:, first:last].view(-1, count, half * 2, 2)[:, :, order]
        scales, zeros = factors.view(-1, count, 2, half, 2).permute(1, 2, 0, 3, 4).unbind(-1)
        # The two nibbles are kept apart, so that every pass runs over contiguous memory.
        wide = torch.empty(count, 2, in_features, half, dtype=dtype)
        wide[:, 0] = block & 15
        wide[:, 1] = block >> 4
        grouped = wide.view(count, 2, scales.shape[2], -1, half)
        grouped.sub_(_MIDPOINT).mul_(scales[:, :, :, None].to(dtype))
        if has_zeros:
            grouped.add_(zeros[:, :, :, None].to(dtype))
        product = torch.matmul(x, wide.view(count * 2, in_features, half))  # (2 blocks, M, half)
        in_order = torch.empty(x.shape[0], count, half * 2, dtype=dtype)
        in_order[:, :, order] = product.view(count, 2, -1, half).permute(2, 0, 1, 3).flatten(2)
        parts.append(in_order.flatten(1))
    return torch.cat(parts, 1)


def _blocks(weight: CpuInt4Weight, max_elements: int = 1 << 20) -> Iterator[tuple[int, Tensor]]:
    """First row, and ``(blocks, in, block / 2) uint8`` for the rows from there on."""
    rows, in_features = weight.out_features, weight.in_features
    size = _block_rows()
    full = rows - rows % size
    step = max(1, max_elements // (size * in_features)) * size
    for first in range(0, full, step):
        last = min(full, first + step)
        yield first, weight.packed[first:last].view(-1, in_features, size // 2)
    if full < rows:
        yield full, weight.packed[full:].view(1, in_features, -1)


@cache
def _block_rows() -> int:
    """Rows of a block: with two columns, the second one's codes begin half a block into it."""
    codes = torch.zeros(_PROBE_ROWS, 2, dtype=torch.int32)
    codes[:, 1] = 1
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
    return int((packed != 0).nonzero()[0]) * 2


@cache
def _row_order(block_rows: int) -> Tensor:
    """The row of each nibble of a block's column: all low nibbles, then all high ones."""
    rows = torch.arange(block_rows, dtype=torch.int32)[:, None]
    order = torch.zeros(block_rows, dtype=torch.int64)
    for digit in range(2):  # a row number as two base-16 digits, one a probe
        codes = (rows >> 4 * digit & 15).repeat(1, 2)  # the op wants an even number of columns
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten().long()
        column = packed[: block_rows // 2]
        order += torch.cat([column & 15, column >> 4]) << 4 * digit
    assert sorted(order.tolist()) == list(range(block_rows))
    return order
