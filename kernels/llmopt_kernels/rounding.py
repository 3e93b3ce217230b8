"""Rounding to fp8 and int8 as torch rounds: the formulas once, for references and for kernels.

With one scale a row (dynamic, per token), ``scale = max(|row|) / MAX``, and 1 where that is zero.
fp8 is e4m3 (OCP 8-bit floating point, no infinities) and saturates; int8 is symmetric, -127..127,
and rounds half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_kernels.triton_or_stub import tl, triton

FP8_MAX = 448.0
INT8_MAX = 127.0
MAX = {torch.float8_e4m3fn: FP8_MAX, torch.int8: INT8_MAX}


def row_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(..., n)`` to ``(..., 1)``, the scale that brings the largest value to the type's end."""
    scale = x.abs().amax(-1, keepdim=True) / MAX[dtype]
    return torch.where(scale == 0, 1.0, scale)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / scale`` in ``dtype`` (fp8 e4m3 or int8); ``scale`` broadcasts."""
    limit = MAX[dtype]
    scaled = (x / scale).clamp(-limit, limit)
    return scaled.round().to(dtype) if dtype == torch.int8 else scaled.float().to(dtype)


@triton.jit
def row_scale_from(largest, LIMIT: tl.constexpr):
    """The scale of a row from its largest magnitude, float32."""
    scale = largest / LIMIT
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def round_half_even(x):
    """Round float32 below 2**22 in magnitude to the nearest integer, halves to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_fp8(scaled):
    """Float32 that is already divided by its scale to fp8 e4m3; NaN stays NaN."""
    clamped = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return clamped.to(tl.float8e4nv)


@triton.jit
def quantize_int8(scaled):
    """Float32 that is already divided by its scale to int8."""
    return round_half_even(tl.minimum(tl.maximum(scaled, -127.0), 127.0)).to(tl.int8)
