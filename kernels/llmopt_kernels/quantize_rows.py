"""Dynamic quantization of activations to fp8 or int8: a scale a token, or one a token and group.

Of the columns that share a scale (a whole row, or ``group`` neighbours as in DeepSeek-V3,
arXiv:2412.19437)::

    scale = max(|x|) / MAX        and 1 where they are all zero
    code  = round(x / scale)      to fp8 e4m3 (MAX 448) or to int8 (MAX 127), halves to even

Computed in float32. A NaN makes its scale NaN, so that it is not lost in a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_kernels.launching import (
    check_chip_has,
    check_choice,
    check_dtype,
    check_last_contiguous,
    check_launchable,
    check_shape,
    launch,
    runs_kernel,
)
from llmopt_kernels.rounding import (
    MAX,
    quantize,
    quantize_fp8,
    quantize_int8,
    row_scale,
    row_scale_from,
)
from llmopt_kernels.triton_or_stub import tl, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP = 128
MAX_BLOCK = 8192
"""Columns that a program keeps in registers; it reads longer rows twice."""
GROUPS_PER_PROGRAM = 16


def quantize_rows(x: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x``.

    Args:
        x: ``(tokens, columns)`` bfloat16, float16 or float32.
        dtype: float8_e4m3fn or int8.
        group: columns that share a scale: ``None`` for the whole row, or 128; the last group of a
            row may be shorter.

    Returns:
        Codes ``(tokens, columns)`` of ``dtype``, and scales ``(tokens, 1)`` or
        ``(tokens, ceil(columns / 128))`` float32.

    Raises:
        ValueError: shape, element type, stride, group or device that does not fit.
    """
    _check(x, dtype, group)
    if runs_kernel(x):
        return launch_quantize_rows(x, dtype, group)
    return quantize_rows_reference(x, dtype, group)


def quantize_rows_reference(
    x: Tensor, dtype: torch.dtype, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """As ``quantize_rows``, in float32 as the kernel: the codes are the same but on a tie."""
    num_tokens, num_columns = x.shape
    width = num_columns if group is None else group
    padded = torch.nn.functional.pad(x.float(), (0, -num_columns % width))
    grouped = padded.view(num_tokens, padded.shape[1] // width, width)
    scales = row_scale(grouped, dtype)
    codes = quantize(grouped, scales, dtype).view(padded.shape)[:, :num_columns]
    return codes.contiguous(), scales[..., 0]


@triton.jit
def largest_magnitude(x, AXIS: tl.constexpr):
    """``max(|x|)`` of float32 over an axis; NaN where there is one, which ``tl.max`` would skip.

    Magnitudes order as their bits do, and a NaN's are above those of infinity.
    """
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(bits, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x, scale, FP8: tl.constexpr):
    if FP8:
        return quantize_fp8(x / scale)
    else:
        return quantize_int8(x / scale)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    num_columns,
    stride_token,
    LIMIT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride_token
    j = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        x = tl.load(x_ptr + j, mask=j < num_columns, other=0.0).to(tl.float32)
        scale = row_scale_from(largest_magnitude(x, 0), LIMIT)
        if codes_ptr is not None:
            codes = _codes(x, scale, FP8)
            tl.store(codes_ptr + token * num_columns + j, codes, mask=j < num_columns)
    else:
        largest = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_columns, BLOCK):
            x = tl.load(x_ptr + start + j, mask=start + j < num_columns, other=0.0)
            bits = tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)
            largest = tl.maximum(largest, bits)
        scale = row_scale_from(tl.max(largest, 0).to(tl.float32, bitcast=True), LIMIT)
        if codes_ptr is not None:
            for start in range(0, num_columns, BLOCK):
                mask = start + j < num_columns
                x = tl.load(x_ptr + start + j, mask=mask, other=0.0).to(tl.float32)
                codes = _codes(x, scale, FP8)
                tl.store(codes_ptr + token * num_columns + start + j, codes, mask=mask)
    tl.store(scales_ptr + token, scale)


@triton.jit
def _quantize_groups_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    num_columns,
    num_groups,
    stride_token,
    stride_scale_token,
    stride_scale_group,
    LIMIT: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = columns < num_columns
    x = tl.load(x_ptr + token * stride_token + columns, mask=mask, other=0.0).to(tl.float32)
    scale_ptrs = scales_ptr + token * stride_scale_token + groups * stride_scale_group
    if GIVEN:
        scales = tl.load(scale_ptrs, mask=groups < num_groups, other=1.0)
    else:
        scales = row_scale_from(largest_magnitude(x, 1), LIMIT)
        tl.store(scale_ptrs, scales, mask=groups < num_groups)
    codes = _codes(x, scales[:, None], FP8)
    tl.store(codes_ptr + token * num_columns + columns, codes, mask=mask)


def launch_quantize_rows(
    x: Tensor, dtype: torch.dtype, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """As ``quantize_rows``, by the kernel.

    Raises:
        ValueError: shape, element type, stride, group or device that does not fit.
    """
    _check(x, dtype, group)
    check_launchable(x=x)
    check_chip_has("dtype", dtype, x.device)
    num_tokens, num_columns = x.shape
    codes = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if group is None:
        return codes, _launch_rows(x, dtype, codes)
    scales = torch.empty(
        num_tokens, triton.cdiv(num_columns, group), dtype=torch.float32, device=x.device
    )
    _launch_groups(x, codes, scales, scales.stride(), given=False)
    return codes, scales


def launch_quantize_by(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of ``x (tokens, columns)`` by scales that are known, by the kernel.

    Args:
        x: bfloat16, float16 or float32.
        scales: float32: one element, ``(tokens, 1)`` or ``(tokens, ceil(columns / 128))``.
        dtype: float8_e4m3fn or int8.

    Raises:
        ValueError: shape, element type, stride or device that does not fit.
    """
    _check(x, dtype, GROUP)
    check_dtype("scales", scales, (torch.float32,))
    num_tokens, num_columns = x.shape
    if scales.numel() == 1:
        strides = (0, 0)
    else:
        by_group = scales.dim() == 2 and scales.shape[1] != 1
        num_groups = triton.cdiv(num_columns, GROUP) if by_group else 1
        check_shape("scales", scales, (num_tokens, num_groups))
        strides = (scales.stride(0), scales.stride(1) if by_group else 0)
    check_launchable(x=x, scales=scales)
    check_chip_has("dtype", dtype, x.device)
    codes = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    _launch_groups(x, codes, scales, strides, given=True)
    return codes


def launch_row_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Only the scales ``(tokens, 1)`` of ``quantize_rows`` without a group, by the kernel.

    Raises:
        ValueError: shape, element type, stride or device that does not fit.
    """
    _check(x, dtype, None)
    check_launchable(x=x)
    return _launch_rows(x, dtype, None)


def _launch_rows(x: Tensor, dtype: torch.dtype, codes: Tensor | None) -> Tensor:
    num_tokens, num_columns = x.shape
    scales = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return scales
    block = min(MAX_BLOCK, triton.next_power_of_2(num_columns))
    launch(
        _quantize_rows_kernel,
        (num_tokens,),
        x,
        codes,
        scales,
        num_columns,
        x.stride(0),
        LIMIT=MAX[dtype],
        FP8=dtype != torch.int8,
        BLOCK=block,
        ONE_BLOCK=num_columns <= block,
        num_warps=8 if block > 2048 else 4,
    )
    return scales


def _launch_groups(
    x: Tensor, codes: Tensor, scales: Tensor, strides: tuple[int, ...], *, given: bool
) -> None:
    num_tokens, num_columns = x.shape
    if num_tokens == 0:
        return
    num_groups = triton.cdiv(num_columns, GROUP)
    block = min(GROUPS_PER_PROGRAM, triton.next_power_of_2(num_groups))
    launch(
        _quantize_groups_kernel,
        (num_tokens, triton.cdiv(num_groups, block)),
        x,
        codes,
        scales,
        num_columns,
        num_groups,
        x.stride(0),
        *strides,
        LIMIT=MAX[codes.dtype],
        FP8=codes.dtype != torch.int8,
        GROUP=GROUP,
        GIVEN=given,
        BLOCK_GROUPS=block,
        num_warps=4,
    )


def _check(x: Tensor, dtype: torch.dtype, group: int | None) -> None:
    check_shape("x", x, (None, None))
    check_dtype("x", x, DTYPES)
    check_last_contiguous("x", x)
    if x.shape[1] == 0:
        raise ValueError("x has no columns")
    check_choice("dtype", dtype, tuple(MAX))
    check_choice("group", group, (None, GROUP))
