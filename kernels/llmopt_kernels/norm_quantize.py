"""RMSNorm (arXiv:1910.07467) with the residual addition before and the quantization after it.

Of a token's row ``x`` of ``n`` channels::

    x        = x + residual                                   (optional; rounded to 16 bit)
    residual = x                                              (in place)
    y        = x / sqrt(mean(x**2) + eps) * (weight + weight_offset)
    out      = y in 16 bit, or round(y / scale) in fp8 or int8

``weight_offset`` is 0, and 1 for Gemma, whose weights are stored about zero. What is normalized is
the sum as the residual keeps it, in 16 bit; from there to the output all is float32, rounded once.
``scale`` is ``max(|y|) / MAX`` of each token (dynamic), or for fp8 one number that is given.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llmopt_kernels.launching import (
    check_chip_has,
    check_dtype,
    check_last_contiguous,
    check_launchable,
    check_shape,
    check_writable,
    launch,
    runs_kernel,
)
from llmopt_kernels.quantize_rows import largest_magnitude
from llmopt_kernels.row_output import (
    HALF_DTYPES,
    check_output,
    dynamic_scale,
    encode,
    new_output,
    rows_reference,
    scaling,
)
from llmopt_kernels.triton_or_stub import tl, triton

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HIDDEN = 16384
"""A row is held in registers: 32 channels a thread of 16 warps."""
MIN_BLOCK = 1024
"""Elements a program: narrow rows, as of a norm over heads, are taken several at a time."""


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalize the rows of ``x``; add ``residual`` first, and update it, where it is given.

    Args:
        x: ``(tokens, hidden)`` bfloat16 or float16, any stride between rows; not changed.
        weight: ``(hidden,)`` bfloat16, float16 or float32.
        eps: added to the mean of squares; positive.
        weight_offset: added to the weight.
        residual: ``(tokens, hidden)`` of ``x``'s type; becomes ``x + residual``, in place.
        dtype: of the output: bfloat16, float16, float8_e4m3fn or int8; ``None`` for ``x``'s.
        scale: one float32, the static scale of an fp8 output; ``None`` for dynamic scales.

    Returns:
        ``(tokens, hidden)`` of ``dtype``, and its scales: ``(tokens, 1) float32`` dynamic, the
        given one static, ``None`` for 16 bit.

    Raises:
        ValueError: shape, element type, stride, device or ``eps`` that does not fit.
    """
    dtype = x.dtype if dtype is None else dtype
    _check(x, weight, eps, residual, dtype, scale)
    run = (
        launch_norm_quantize
        if runs_kernel(x)
        else partial(norm_quantize_reference, compute=torch.float32)
    )
    y, scales = run(
        x,
        weight,
        eps=eps,
        weight_offset=weight_offset,
        residual=residual,
        dtype=dtype,
        scale=scale,
    )
    return y.to(dtype), scales


def norm_quantize_reference(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """As ``norm_quantize``, in ``compute``; where that rounds to 16 bit, this does not.

    ``residual`` changes in place.
    """
    if residual is not None:
        residual.copy_(x.to(compute) + residual.to(compute))
        x = residual
    wide = x.to(compute)
    rms = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    y = wide / rms * (weight.to(compute) + weight_offset)
    return rows_reference(y, x.dtype if dtype is None else dtype, scale)


@triton.jit
def _norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    eps,
    weight_offset,
    num_tokens,
    hidden,
    stride_x,
    stride_residual,
    SCALING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_tokens)[:, None] & (j < hidden)
    x = tl.load(x_ptr + rows[:, None] * stride_x + j, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + j, mask=j < hidden, other=0.0).to(tl.float32) + weight_offset
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows[:, None] * stride_residual + j
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        kept = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, kept, mask=mask)
        x = kept.to(tl.float32)
    mean_square = tl.sum(x * x, 1) / hidden
    y = x * tl.rsqrt(mean_square + eps)[:, None] * weight
    ELEMENT: tl.constexpr = out_ptr.dtype.element_ty
    y_scale = 1.0
    if SCALING == "static":
        y_scale = tl.load(scale_ptr)
    elif SCALING == "dynamic":
        by_row = dynamic_scale(largest_magnitude(y, 1), ELEMENT)
        tl.store(scale_ptr + rows, by_row, mask=rows < num_tokens)
        y_scale = by_row[:, None]
    tl.store(out_ptr + rows[:, None] * hidden + j, encode(y, y_scale, ELEMENT), mask=mask)


def launch_norm_quantize(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``norm_quantize``, by the kernel.

    Raises:
        ValueError: shape, element type, stride, device or ``eps`` that does not fit.
    """
    dtype = x.dtype if dtype is None else dtype
    _check(x, weight, eps, residual, dtype, scale)
    check_launchable(x=x, weight=weight, residual=residual, scale=scale)
    check_chip_has("dtype", dtype, x.device)
    num_tokens, hidden = x.shape
    out, scales = new_output(num_tokens, hidden, dtype, scale, x)
    if num_tokens == 0:
        return out, scales
    block = triton.next_power_of_2(hidden)
    rows = max(1, MIN_BLOCK // block)
    launch(
        _norm_quantize_kernel,
        (triton.cdiv(num_tokens, rows),),
        x,
        residual,
        weight,
        out,
        scales,
        eps,
        weight_offset,
        num_tokens,
        hidden,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        SCALING=scaling(dtype, scale),
        ROWS=rows,
        BLOCK=block,
        num_warps=min(16, rows * block // 512),
    )
    return out, scales


def _check(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dtype: torch.dtype,
    scale: Tensor | None,
) -> None:
    check_shape("x", x, (None, None))
    check_dtype("x", x, HALF_DTYPES)
    check_last_contiguous("x", x)
    if not 0 < x.shape[1] <= MAX_HIDDEN:
        raise ValueError(f"x has {x.shape[1]} channels; 1 to {MAX_HIDDEN} fit")
    check_shape("weight", weight, (x.shape[1],))
    check_dtype("weight", weight, WEIGHT_DTYPES)
    check_last_contiguous("weight", weight)
    if residual is not None:
        check_shape("residual", residual, x.shape)
        check_dtype("residual", residual, (x.dtype,))
        check_last_contiguous("residual", residual)
        check_writable("residual", residual)
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive")
    check_output(dtype, scale)
