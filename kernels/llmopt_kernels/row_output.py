"""What operations that produce rows share: rounding a row to 16 bit, fp8 or int8, as asked for.

fp8 and int8 have one float32 scale a token, ``max(|row|) / MAX`` (dynamic), or fp8 one scale that
is given (static). The float32 row is quantized as it was computed, not rounded to 16 bit before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_kernels.launching import check_dtype
from llmopt_kernels.rounding import (
    MAX,
    quantize,
    quantize_fp8,
    quantize_int8,
    row_scale,
    row_scale_from,
)
from llmopt_kernels.triton_or_stub import tl, triton

HALF_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def encode(x, scale, ELEMENT: tl.constexpr):
    """Float32 to elements of a type; ``scale`` matters to fp8 and int8 alone."""
    if tl.int8 == ELEMENT:
        return quantize_int8(x / scale)
    elif tl.float8e4nv == ELEMENT:
        return quantize_fp8(x / scale)
    else:
        return x.to(ELEMENT)


@triton.jit
def larger(a, b):
    """The larger of two; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dynamic_scale(largest, ELEMENT: tl.constexpr):
    """The scale of a row of int8 or fp8 from its largest magnitude."""
    if tl.int8 == ELEMENT:
        return row_scale_from(largest, 127.0)
    else:
        return row_scale_from(largest, 448.0)


def check_output(dtype: torch.dtype, scale: Tensor | None) -> None:
    """Hold that rows can be rounded to ``dtype`` with ``scale`` (``None``: dynamic, or 16 bit).

    Raises:
        ValueError: another element type, or a scale that does not belong to it; says what it got.
    """
    if dtype not in (*HALF_DTYPES, *MAX):
        some = ", ".join(str(d).removeprefix("torch.") for d in (*HALF_DTYPES, *MAX))
        raise ValueError(f"dtype is {str(dtype).removeprefix('torch.')}; use {some}")
    if scale is None:
        return
    if dtype != torch.float8_e4m3fn:
        raise ValueError(f"a static scale was given for {dtype}; only float8_e4m3fn takes one")
    check_dtype("scale", scale, (torch.float32,))
    if scale.numel() != 1:
        raise ValueError(f"scale has shape {list(scale.shape)}; a static one has one element")


def new_output(
    num_tokens: int, num_columns: int, dtype: torch.dtype, scale: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Room for rows of ``dtype`` and, where they are dynamic, for their scales; else ``scale``."""
    out = torch.empty(num_tokens, num_columns, dtype=dtype, device=like.device)
    if dtype in MAX and scale is None:
        scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=like.device)
    return out, scale


def scaling(dtype: torch.dtype, scale: Tensor | None) -> str:
    """How a kernel scales rows of ``dtype``: "none" in 16 bit, "static" by a scale, "dynamic"."""
    if dtype not in MAX:
        return "none"
    return "dynamic" if scale is None else "static"


def rows_reference(
    y: Tensor, dtype: torch.dtype, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Round rows ``(tokens, n)`` to fp8 or int8; for 16 bit they stay in the type they are in."""
    if dtype not in MAX:
        return y, None
    if scale is not None:
        return quantize(y, scale.to(y.dtype).view(1, 1), dtype), scale
    if y.shape[1] == 0:
        return y.to(dtype), torch.ones(y.shape[0], 1, dtype=torch.float32, device=y.device)
    dynamic = row_scale(y, dtype)
    return quantize(y, dynamic, dtype), dynamic.float()
