"""``y = x @ W^T + b`` for a weight of packed codes and 16- or 32-bit activations.

``W[i, j] = (code[i, j] - zero_point[i, g(j)]) * scale[i, g(j)]``, ``g(j)`` the group of column j,
as GPTQ has it (arXiv:2210.17323); that small batches can be multiplied by such a weight as fast as
its bytes are read is Marlin's point (arXiv:2408.11743).

The kernel computes ``W @ x^T``: the weight is the operand that a matrix unit takes from registers,
where it is unpacked, and ``x`` padded to 16 rows costs the unit time that it has. Codes become
16-bit floats without conversions: added to the bits of ``1.5 * 2**m``, ``m`` the bits of the
mantissa, they read as that plus the code. A shift, a mask, an addition and a subtraction, each of
two codes, unpack them exactly in the layout of ``gpu_weight``: 1.9 instructions a weight, 2.7 for
all of the loop as compiled for an H200 at batch 1. By its data sheet that chip can issue 3.1 in the
time in which its memory delivers a 4-bit weight. Scales multiply the sum of a group in float32, not
the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.cpu_int4 import CpuInt4Weight
from llmopt_kernels.gpu_weight import BITS, ROW_MULTIPLE, GpuWeight
from llmopt_kernels.launching import (
    check_choice,
    check_dtype,
    check_last_contiguous,
    check_launchable,
    check_shape,
    launch,
    runs_kernel,
)
from llmopt_kernels.linear_w4a16_on_cpu import DTYPES, matmul_cpu_int4, matmul_plain
from llmopt_kernels.packed_weight import PackedWeight
from llmopt_kernels.triton_or_stub import tl, triton

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float32)


def linear_w4a16(
    x: Tensor, weight: PackedWeight | CpuInt4Weight | GpuWeight, bias: Tensor | None = None
) -> Tensor:
    """``x (..., in) @ weight^T + bias``, ``(..., out)`` in the type of ``x``.

    A ``GpuWeight`` on a GPU goes through the kernel for 16-bit ``x``. A ``CpuInt4Weight`` goes
    through torch's int4 kernel for small batches and a dequantized product for large ones
    (``cpu_choices``). Everything else, a ``PackedWeight`` of any width among it, takes the
    dequantized product, a few rows of the weight at a time.

    Raises:
        ValueError: shape, element type or device that does not fit.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"input has {x.shape[-1]} features, the weight {weight.in_features}")
    check_dtype("x", x, DTYPES)
    if x.device != weight.packed.device:
        raise ValueError(f"input is on {x.device}, the weight on {weight.packed.device}")
    rows = x.reshape(-1, weight.in_features)
    if isinstance(weight, GpuWeight) and runs_kernel(x) and x.dtype in KERNEL_DTYPES:
        return launch_linear_w4a16(rows, weight, bias).view(*x.shape[:-1], weight.out_features)
    if isinstance(weight, CpuInt4Weight):
        product = matmul_cpu_int4(rows, weight)
    else:
        product = matmul_plain(rows, weight)
    if bias is not None:
        product = product + bias.to(product.dtype)
    return product.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def linear_w4a16_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The product in float64: ``x (..., in)`` to ``(..., out) float64``."""
    product = x.double() @ weight.dequantize(torch.float64).T
    return product if bias is None else product + bias.double()


@triton.jit
def _unpack_plane(
    words, base, INDEX: tl.constexpr, BITS: tl.constexpr, IN_HALF: tl.constexpr, dtype: tl.constexpr
):
    """Codes of a plane less their zero points: ``(rows, n) int32`` to ``(rows, 2n) dtype``.

    ``base`` is a pair of ``1.5 * 2**m`` less the zero point, ``m`` the bits of a mantissa: adding a
    code changes the low bits of the mantissa alone, so integers add two pairs at once.
    """
    mask: tl.constexpr = 0x000F000F if BITS == 4 else 0x00FF00FF
    middle: tl.constexpr = 1536.0 if IN_HALF else 192.0
    middle_dtype: tl.constexpr = tl.float16 if IN_HALF else tl.bfloat16
    pairs = ((words >> INDEX * BITS) & mask) + base
    low = (pairs & 0xFFFF).to(tl.int16).to(middle_dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(middle_dtype, bitcast=True)
    shifted = tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))
    difference = shifted - middle
    if IN_HALF and dtype == tl.bfloat16:
        difference = difference.to(tl.float32)
    return difference.to(dtype)


@triton.jit
def _pair_less_zero(zero, IN_HALF: tl.constexpr):
    """``base`` of ``_unpack_plane`` for the zero point: 1536 is 0x6600 in float16, 192 0x4340."""
    middle: tl.constexpr = 0x66006600 if IN_HALF else 0x43404340
    return middle - zero * 0x00010001


@triton.jit
def _linear_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    batch,
    out_features,
    in_features,
    padded_out,
    num_groups,
    num_chunks,
    chunks_per_split,
    stride_x,
    stride_split,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    RUN: tl.constexpr,
    IN_HALF: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_CHUNKS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    PLANES: tl.constexpr = 16 // BITS
    CHUNK: tl.constexpr = PLANES * PLANE
    ONE_GROUP: tl.constexpr = GROUP_SIZE == 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    item = tl.program_id(0) * BLOCK_BATCH
    row = tl.program_id(1) * BLOCK_OUT
    items = item + tl.arange(0, BLOCK_BATCH)
    rows = row + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, PLANE)
    halves = tl.arange(0, PLANE // 2)
    split = tl.program_id(2)
    first = split * chunks_per_split
    last = tl.minimum(first + chunks_per_split, num_chunks)

    # Scalar pointers move and the offsets stay: tiles of pointers would take twice the registers.
    packed_ptr += (first.to(tl.int64) * padded_out + row) * (PLANE // 2)
    words_at = tl.arange(0, BLOCK_OUT)[:, None] * (PLANE // 2) + halves[None, :]
    x_ptr += item.to(tl.int64) * stride_x + first * CHUNK
    x_at = tl.arange(0, BLOCK_BATCH)[:, None] * stride_x + columns[None, :]
    group = 0
    if not ONE_GROUP:
        group = tl.minimum(first * CHUNK // GROUP_SIZE, num_groups - 1)
    scale = tl.load(scales_ptr + group * padded_out + rows)
    if not HAS_ZEROS:
        base = _pair_less_zero(1 << (BITS - 1), IN_HALF)
    total = tl.zeros((BLOCK_OUT, BLOCK_BATCH), tl.float32)
    for chunk in range(first, last):
        words = tl.load(packed_ptr + words_at)
        for run in tl.static_range(PLANES // RUN):
            # A run of planes lies in one group: its products are added, then scaled.
            start = chunk * CHUNK + run * RUN * PLANE
            if HAS_ZEROS:
                group = 0
                if not ONE_GROUP:
                    group = tl.minimum(start // GROUP_SIZE, num_groups - 1)
                fours = tl.load(zeros_ptr + group // 4 * padded_out + rows)
                base = _pair_less_zero((fours >> (group % 4 * 8)) & 0xFF, IN_HALF)[:, None]
            if not ONE_GROUP:
                # The next run's, so that they arrive while this one's product is computed.
                group = tl.minimum((start + RUN * PLANE) // GROUP_SIZE, num_groups - 1)
                next_scale = tl.load(scales_ptr + group * padded_out + rows)
                product = tl.zeros((BLOCK_OUT, BLOCK_BATCH), tl.float32)
            for step in tl.static_range(RUN):
                mask = (items < batch)[:, None]
                if not WHOLE_CHUNKS:
                    mask &= (start + step * PLANE + columns < in_features)[None, :]
                x = tl.load(x_ptr + (run * RUN + step) * PLANE + x_at, mask=mask, other=0.0)
                weight = _unpack_plane(words, base, run * RUN + step, BITS, IN_HALF, dtype)
                if ONE_GROUP:
                    total = tl.dot(weight, tl.trans(x), total)
                else:
                    product = tl.dot(weight, tl.trans(x), product)
            if not ONE_GROUP:
                total += product * scale.to(tl.float32)[:, None]
                scale = next_scale
        packed_ptr += padded_out * (PLANE // 2)
        x_ptr += CHUNK
    if ONE_GROUP:
        total *= scale.to(tl.float32)[:, None]
    in_out = rows < out_features
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=in_out, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + split.to(tl.int64) * stride_split
    out_ptrs += items.to(tl.int64)[:, None] * out_features + rows[None, :]
    result = tl.trans(total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, result, mask=(items < batch)[:, None] & in_out[None, :])


@triton.jit
def _add_splits_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    out_features,
    stride_split,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < out_features
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        part_ptrs = parts_ptr + split * stride_split + item * out_features + rows
        total += tl.load(part_ptrs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + item * out_features + rows, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """Tiles of the kernel.

    Attributes:
        block_batch: items of the batch (rows of ``x``) of a program.
        block_out: rows of the weight of a program; one of ``BLOCKS_OUT``.
        splits: programs that share the columns; their sums are added by a second kernel.
        num_warps: as triton's.
        num_stages: chunks of the weight in flight.
    """

    block_batch: int
    block_out: int
    splits: int
    num_warps: int
    num_stages: int


MULTIPROCESSORS = 132
"""Of an H100 or H200; columns are split where the rows alone give fewer programs than it holds."""

MAX_SPLITS = 16
BLOCKS_OUT = (64, 128)
"""They divide the rows of the layout, which are padded for it."""

BLOCK_ADDED = 512


def shipped_config(batch: int, out_features: int, num_chunks: int) -> LinearConfig:
    """Tiles for ``batch`` items and a weight of ``num_chunks`` chunks of columns.

    A small batch takes small programs of two warps, several on a multiprocessor, whose products
    need no barrier among warps; a large one takes tiles as large as registers allow, since it waits
    for ``x`` from the second-level cache.
    """
    if batch <= 16:
        tile, resident = (16, 64, 2, 3), 6
    elif batch <= 32:
        tile, resident = (32, 128, 4, 3), 2
    else:
        tile, resident = (64, 128, 8, 2), 1
    block_batch, block_out, num_warps, num_stages = tile
    tiles = triton.cdiv(batch, block_batch) * triton.cdiv(out_features, block_out)
    splits = min(MULTIPROCESSORS * resident // tiles, num_chunks // 2, MAX_SPLITS)
    return LinearConfig(block_batch, block_out, max(1, splits), num_warps, num_stages)


def candidate_configs(batch: int, out_features: int, num_chunks: int) -> list[LinearConfig]:
    """What a benchmark tries: the shipped tiles first, then others."""
    shipped = shipped_config(batch, out_features, num_chunks)
    tiles = {
        16: [(16, 64, 2, 3), (16, 64, 2, 4), (16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 4, 4)],
        32: [(32, 64, 2, 3), (32, 64, 4, 3), (32, 128, 4, 2), (32, 128, 4, 3), (32, 128, 8, 3)],
        64: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3)],
    }[shipped.block_batch]
    splits = {1, max(1, shipped.splits // 2), shipped.splits, min(MAX_SPLITS, 2 * shipped.splits)}
    others = [
        LinearConfig(block_batch, block_out, split, num_warps, num_stages)
        for block_batch, block_out, num_warps, num_stages in tiles
        for split in sorted(splits)
    ]
    return list(dict.fromkeys([shipped, *others]))


def launch_linear_w4a16(
    x: Tensor, weight: GpuWeight, bias: Tensor | None = None, config: LinearConfig | None = None
) -> Tensor:
    """``x (batch, in) @ weight^T + bias`` by the kernel, ``(batch, out)`` in the type of ``x``.

    Args:
        x: bfloat16 or float16; rows may be strided.
        weight: as ``to_gpu_weight`` gives it.
        bias: ``(out,)``, any floating type.
        config: tiles; ``None`` takes ``shipped_config``.

    Raises:
        ValueError: shape, element type, stride or device that does not fit.
    """
    _check(x, weight, bias)
    if config is not None:
        check_choice("block_out", config.block_out, BLOCKS_OUT)
    check_launchable(
        x=x,
        packed=weight.packed,
        scales=weight.scales,
        zero_points=weight.zero_points,
        column_order=weight.column_order,
        bias=bias,
    )
    batch = x.shape[0]
    if weight.column_order is not None:
        x = x.index_select(1, weight.column_order)
    out = torch.empty(batch, weight.out_features, dtype=x.dtype, device=x.device)
    if batch == 0:
        return out
    num_chunks, padded_out, _ = weight.packed.shape
    config = config or shipped_config(batch, weight.out_features, num_chunks)
    chunks_per_split = triton.cdiv(num_chunks, config.splits)
    splits = triton.cdiv(num_chunks, chunks_per_split)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)
    num_groups = weight.scales.shape[0]
    planes = 16 // weight.bits
    one_group = num_groups == 1
    launch(
        _linear_kernel,
        (
            triton.cdiv(batch, config.block_batch),
            triton.cdiv(weight.out_features, config.block_out),
            splits,
        ),
        x,
        weight.packed,
        weight.scales,
        weight.zero_points,
        bias if splits == 1 else None,
        parts,
        batch,
        weight.out_features,
        weight.in_features,
        padded_out,
        num_groups,
        num_chunks,
        chunks_per_split,
        x.stride(0),
        out.numel(),
        BITS=weight.bits,
        PLANE=weight.plane,
        GROUP_SIZE=0 if one_group else weight.group_size,
        RUN=planes if one_group else _planes_in_a_group(weight, planes),
        IN_HALF=weight.bits == 8 or x.dtype == torch.float16,
        HAS_ZEROS=weight.zero_points is not None,
        HAS_BIAS=bias is not None and splits == 1,
        WHOLE_CHUNKS=weight.in_features % weight.chunk == 0,
        BLOCK_BATCH=config.block_batch,
        BLOCK_OUT=config.block_out,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        launch(
            _add_splits_kernel,
            (batch, triton.cdiv(weight.out_features, BLOCK_ADDED)),
            parts,
            bias,
            out,
            weight.out_features,
            out.numel(),
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK_ADDED,
            num_warps=4,
        )
    return out


def _planes_in_a_group(weight: GpuWeight, planes: int) -> int:
    """Planes of a chunk whose products may be added before they are scaled: they share a group."""
    return max(
        run for run in (1, 2, 4) if run <= planes and not weight.group_size % (run * weight.plane)
    )


def _check(x: Tensor, weight: GpuWeight, bias: Tensor | None) -> None:
    check_shape("x", x, (None, weight.in_features))
    check_dtype("x", x, KERNEL_DTYPES)
    check_last_contiguous("x", x)
    check_choice("bits", weight.bits, BITS)
    if bias is not None:
        check_dtype("bias", bias, FLOAT_DTYPES)
        check_shape("bias", bias, (weight.out_features,))
        check_last_contiguous("bias", bias)
    check_dtype("packed", weight.packed, (torch.int32,))
    check_shape("packed", weight.packed, (-(-weight.in_features // weight.chunk), None, None))
    num_groups, padded_out = weight.scales.shape[0], weight.packed.shape[1]
    if padded_out < weight.out_features or padded_out % ROW_MULTIPLE:
        raise ValueError(f"packed has {padded_out} rows for {weight.out_features} of the weight")
    check_dtype("scales", weight.scales, FLOAT_DTYPES)
    check_shape("scales", weight.scales, (None, padded_out))
    if not num_groups or weight.in_features % num_groups or weight.group_size % weight.plane:
        raise ValueError(
            f"scales has {num_groups} groups for {weight.in_features} columns in planes of "
            f"{weight.plane}; a group is a whole number of planes"
        )
    if weight.column_order is not None:
        check_dtype("column_order", weight.column_order, (torch.int64,))
        check_shape("column_order", weight.column_order, (weight.in_features,))
    if weight.zero_points is not None:
        check_dtype("zero_points", weight.zero_points, (torch.int32,))
        check_shape("zero_points", weight.zero_points, (-(-num_groups // 4), padded_out))
    for name in ("packed", "scales", "zero_points"):
        part = getattr(weight, name)
        if part is not None and not part.is_contiguous():
            raise ValueError(f"{name} has strides {part.stride()}; it must be contiguous")
