"""``y = x @ W^T + b``, both factors in fp8 e4m3, products summed in float32.

With codes ``a`` of the activations and ``c`` of the weight and their scales ``s`` and ``t``::

    y[i, o] = sum_k  s[i, g(k)] a[i, k]  *  t[o', g(k)] c[o, k]    + b[o]

Scales are one a tensor, one a token (of x) or channel (of W), or DeepSeek-V3's (arXiv:2412.19437):
one a token and 128 columns of x, one a block of 128 x 128 of W. Those of the last kind differ
along the sum and are applied to each 128 columns' partial sum, the others once at the end.

x in 16 bits is quantized on the way: by a scale given (static), or by one a token, or, with a
weight in blocks, one a token and 128 columns (dynamic, as ``quantize_rows`` defines them).

Hopper's fp8 units keep about 14 bits of a running sum. Unless ``fast_accumulation`` is asked for,
a sum is moved to float32 registers every 128 columns, as DeepSeek-V3 does; that is what
``torch._scaled_mm`` means by ``use_fast_accum`` too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmopt_kernels.fp8_weight import (
    FP8,
    Fp8Weight,
    Granularity,
    is_one,
    num_groups,
    quantize_weight,
)
from llmopt_kernels.launching import (
    check_choice,
    check_dtype,
    check_last_contiguous,
    check_launchable,
    check_shape,
    launch,
    runs_kernel,
)
from llmopt_kernels.linear_fp8_config import (
    Fp8Config,
    candidate_configs,
    check_config,
    shipped_config,
)
from llmopt_kernels.quantize_rows import (
    GROUP,
    largest_magnitude,
    launch_quantize_by,
    launch_quantize_rows,
    launch_row_scales,
    quantize_rows_reference,
)
from llmopt_kernels.rounding import FP8_MAX, quantize, quantize_fp8, row_scale_from
from llmopt_kernels.triton_or_stub import tl, triton

__all__ = [
    "FP8",
    "Fp8Config",
    "Fp8Weight",
    "Granularity",
    "candidate_configs",
    "launch_linear_fp8",
    "linear_fp8",
    "linear_fp8_reference",
    "quantize_weight",
    "shipped_config",
]

DTYPES = (torch.bfloat16, torch.float16)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear_fp8(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    fast_accumulation: bool = False,
) -> Tensor:
    """``x @ weight^T + bias`` by fp8 products.

    Args:
        x: ``(..., in)`` float8_e4m3fn with its ``x_scale``, or bfloat16 or float16, which is
            quantized: by ``x_scale``, or without one dynamically.
        weight: ``(out, in)``.
        bias: ``(out,)`` bfloat16, float16 or float32.
        x_scale: float32: ``()``, ``(1,)`` or ``(1, 1)`` for the tensor, ``(..., 1)`` for tokens,
            ``(..., ceil(in / 128))`` for tokens and 128 columns.
        out_dtype: bfloat16, float16 or float32; without it that of a 16-bit x, bfloat16 of fp8.
        fast_accumulation: leave sums in the tensor cores' own precision on Hopper. Partial sums
            that a scale is applied to (x by groups, weight by blocks) are in float32 either way.

    Returns:
        ``(..., out)`` of ``out_dtype``.

    Raises:
        ValueError: shape, element type, stride or device that does not fit.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if x_scale is not None and not is_one(x_scale) and x_scale.dim() == x.dim():
        x_scale = x_scale.reshape(-1, x_scale.shape[-1])
    if runs_kernel(x):
        y = launch_linear_fp8(
            rows,
            weight,
            bias,
            x_scale=x_scale,
            out_dtype=out_dtype,
            fast_accumulation=fast_accumulation,
        )
    else:
        _check(rows, weight, bias, x_scale, out_dtype)
        y = linear_fp8_reference(rows, weight, bias, x_scale=x_scale, dtype=torch.float32)
        y = y.to(out_dtype or default_out_dtype(x))
    return y.view(*x.shape[:-1], weight.out_features)


def linear_fp8_reference(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``(tokens, out)`` in ``dtype``; 16-bit ``x`` is quantized in float32, as by the kernel."""
    codes, scales = _quantized_reference(x, weight, x_scale)
    values = codes.to(dtype) * _over_columns(scales, x.shape[1]).to(dtype)
    y = values @ weight.dequantize(dtype).T
    return y if bias is None else y + bias.to(dtype)


def _quantized_reference(
    x: Tensor, weight: Fp8Weight, x_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x_scale is None:
        group = GROUP if weight.granularity == "block" else None
        return quantize_rows_reference(x, FP8, group)
    if x.dtype != FP8:
        x = quantize(x.float(), _over_columns(x_scale, x.shape[1]), FP8)
    return x, x_scale


def _over_columns(scales: Tensor, num_columns: int) -> Tensor:
    if scales.dim() < 2 or scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(GROUP, 1)[:, :num_columns]


@triton.jit
def _tile_of(program, num_tokens, out_features, BLOCK_M, BLOCK_N, GROUP_M: tl.constexpr):
    """Rows and columns of tiles; GROUP_M rows of tiles are walked together and share W in L2."""
    num_m, num_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    first = program // (GROUP_M * num_n) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    within = program % (GROUP_M * num_n)
    return first + within % height, within // height


@triton.jit
def _finish(
    sums,
    m,
    n,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    out_features,
    stride_x_scale,
    stride_w_scale,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
):
    """Apply the scales that are constant along the sum, add the bias, store ``(M, N)``."""
    # The weight's first: a large activation overflows no sooner than the output.
    if W_SCALE == "tensor":
        sums *= tl.load(w_scale_ptr)
    elif W_SCALE == "channel":
        scale = tl.load(w_scale_ptr + n * stride_w_scale, n < out_features, other=0.0)
        sums *= scale[None, :]
    if X_SCALE == "tensor":
        sums *= tl.load(x_scale_ptr)
    elif X_SCALE == "token":
        scale = tl.load(x_scale_ptr + m.to(tl.int64) * stride_x_scale, m < num_tokens, other=0.0)
        sums *= scale[:, None]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, n < out_features, other=0.0).to(tl.float32)[None, :]
    mask = (m < num_tokens)[:, None] & (n < out_features)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(y_ptrs, sums.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_fp8_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    partial_ptr,
    num_tokens,
    out_features,
    in_features,
    columns_per_split,
    stride_x,
    stride_w,
    stride_x_scale,
    stride_x_scale_group,
    stride_w_scale,
    stride_w_scale_group,
    stride_split,
    X_SCALE: tl.constexpr,  # "tensor", "token", "group", "dynamic group"
    W_SCALE: tl.constexpr,  # "tensor", "channel", "block"
    QUANTIZE: tl.constexpr,  # x is in 16 bits
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAST: tl.constexpr,
    SPLITS: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_of(tl.program_id(0), num_tokens, out_features, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    start = tl.program_id(1) * columns_per_split
    end = tl.minimum(start + columns_per_split, in_features)
    # Rows past the end are the last one again: a load without a mask, of what is not stored.
    row = tl.minimum(m, num_tokens - 1).to(tl.int64)
    channel = tl.minimum(n, out_features - 1).to(tl.int64)
    if not TMA:
        x_ptrs = x_ptr + row[:, None] * stride_x + (start + k)[None, :]
        w_ptrs = w_ptr + channel[:, None] * stride_w + (start + k)[None, :]
    GROUPED: tl.constexpr = X_SCALE == "group" or X_SCALE == "dynamic group" or W_SCALE == "block"
    if QUANTIZE:
        if X_SCALE == "tensor":
            x_scale = tl.load(x_scale_ptr)
        elif X_SCALE == "token":
            x_scale = tl.load(x_scale_ptr + row * stride_x_scale)[:, None]
    if SWAP:
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for column in range(start, end, BLOCK_K):
        if TMA:  # x_ptr and w_ptr are descriptors; what lies outside of them reads as zero
            x = x_ptr.load([tile_m * BLOCK_M, column])
            w = w_ptr.load([tile_n * BLOCK_N, column])
        elif EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k < end - column)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k < end - column)[None, :], other=0.0)
        if not TMA:
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
        if X_SCALE == "group":
            group = column // BLOCK_K
            x_scale = tl.load(x_scale_ptr + row * stride_x_scale + group * stride_x_scale_group)
            x_scale = x_scale[:, None]
        if QUANTIZE:
            x = x.to(tl.float32)
            if X_SCALE == "dynamic group":
                x_scale = row_scale_from(largest_magnitude(x, 1), LIMIT)[:, None]
            x = quantize_fp8(x / x_scale)
        if GROUPED:
            # BLOCK_K is the group, and BLOCK_N divides a block: one scale of W for the tile.
            product = tl.dot(w, tl.trans(x)) if SWAP else tl.dot(x, tl.trans(w))
            scale = 1.0
            if W_SCALE == "block":
                block = tile_n * BLOCK_N // BLOCK_K * stride_w_scale
                scale = tl.load(w_scale_ptr + block + column // BLOCK_K * stride_w_scale_group)
            if X_SCALE == "group" or X_SCALE == "dynamic group":
                scale = (tl.trans(x_scale) if SWAP else x_scale) * scale
            sums += product * scale
        elif SWAP:
            if FAST:
                sums = tl.dot(w, tl.trans(x), sums)
            else:
                sums = tl.dot(w, tl.trans(x), sums, max_num_imprecise_acc=128)
        else:
            if FAST:
                sums = tl.dot(x, tl.trans(w), sums)
            else:
                sums = tl.dot(x, tl.trans(w), sums, max_num_imprecise_acc=128)
    if SWAP:
        sums = tl.trans(sums)
    if SPLITS == 1:
        _finish(
            sums,
            m,
            n,
            x_scale_ptr,
            w_scale_ptr,
            bias_ptr,
            y_ptr,
            num_tokens,
            out_features,
            stride_x_scale,
            stride_w_scale,
            X_SCALE,
            W_SCALE,
        )
    else:
        partial_ptr += tl.program_id(1).to(tl.int64) * stride_split
        mask = (m < num_tokens)[:, None] & (n < out_features)[None, :]
        tl.store(partial_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :], sums, mask=mask)


@triton.jit
def _sum_splits_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    num_tokens,
    out_features,
    stride_split,
    stride_x_scale,
    stride_w_scale,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (n < out_features)[None, :]
    partial_ptrs = partial_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    sums = tl.zeros([1, BLOCK], tl.float32)
    for _ in range(SPLITS):
        sums += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += stride_split
    _finish(
        sums,
        m,
        n,
        x_scale_ptr,
        w_scale_ptr,
        bias_ptr,
        y_ptr,
        num_tokens,
        out_features,
        stride_x_scale,
        stride_w_scale,
        X_SCALE,
        W_SCALE,
    )


def launch_linear_fp8(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    fast_accumulation: bool = False,
    config: Fp8Config | None = None,
) -> Tensor:
    """As ``linear_fp8`` of ``x (tokens, in)``, by the kernel, cut up as ``config`` says.

    Raises:
        ValueError: shape, element type, stride, device or configuration that does not fit.
    """
    _check(x, weight, bias, x_scale, out_dtype)
    check_launchable(x=x, codes=weight.codes, scales=weight.scales, bias=bias, x_scale=x_scale)
    (num_tokens, in_features), out_features = x.shape, weight.out_features
    dtype = out_dtype or default_out_dtype(x)
    y = torch.empty(num_tokens, out_features, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    w_kind = weight.granularity
    x_kind = _x_kind(x_scale, x.shape, dynamic_group=w_kind == "block")
    grouped = "group" in x_kind or w_kind == "block"
    if config is None:
        config = shipped_config(
            num_tokens,
            out_features,
            in_features,
            grouped=grouped,
            fast=fast_accumulation,
            aligned=_is_aligned(x) and _is_aligned(weight.codes),
        )
    check_config(config, grouped=grouped)
    if x.dtype != FP8:
        x, x_scale, x_kind = _quantized(x, x_scale, x_kind, config)
    columns = config.block_k * math.ceil(in_features / (config.block_k * config.splits))
    splits = max(1, math.ceil(in_features / columns)) if columns else 1
    partial = None
    if splits > 1:
        partial = torch.empty(splits, *y.shape, dtype=torch.float32, device=x.device)
    tiles = math.ceil(num_tokens / config.block_m) * math.ceil(out_features / config.block_n)
    x_scale_strides = _strides(x_scale)
    w_scale_strides = _strides(weight.scales)
    launch(
        _linear_fp8_kernel,
        (tiles, splits),
        _described(x, config.block_m, config) if config.tma else x,
        _described(weight.codes, config.block_n, config) if config.tma else weight.codes,
        bias,
        y,
        x_scale,
        weight.scales,
        partial,
        num_tokens,
        out_features,
        in_features,
        columns,
        x.stride(0),
        weight.codes.stride(0),
        *x_scale_strides,
        *w_scale_strides,
        y.numel(),
        X_SCALE=x_kind,
        W_SCALE=w_kind,
        QUANTIZE=x.dtype != FP8,
        SWAP=config.swap,
        TMA=config.tma,
        EVEN_K=in_features % config.block_k == 0,
        FAST=fast_accumulation,
        SPLITS=splits,
        LIMIT=FP8_MAX,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if partial is not None:
        block = min(1024, triton.next_power_of_2(out_features))
        launch(
            _sum_splits_kernel,
            (num_tokens, math.ceil(out_features / block)),
            partial,
            bias,
            y,
            x_scale,
            weight.scales,
            num_tokens,
            out_features,
            y.numel(),
            x_scale_strides[0],
            w_scale_strides[0],
            X_SCALE=x_kind,
            W_SCALE=w_kind,
            SPLITS=splits,
            BLOCK=block,
            num_warps=4,
        )
    return y


def default_out_dtype(x: Tensor) -> torch.dtype:
    """The element type of the output where none is asked for."""
    return torch.bfloat16 if x.dtype == FP8 else x.dtype


def _quantized(
    x: Tensor, x_scale: Tensor | None, x_kind: str, config: Fp8Config
) -> tuple[Tensor, Tensor | None, str]:
    """What the product of a 16-bit x is launched with: codes or x itself, scales, their kind."""
    group = GROUP if x_kind == "dynamic group" else None
    if config.quantize_in_loop:
        if x_scale is None and group is None:
            x_scale = launch_row_scales(x, FP8)
        return x, x_scale, x_kind
    if x_scale is not None:
        return launch_quantize_by(x, x_scale, FP8), x_scale, x_kind
    codes, scales = launch_quantize_rows(x, FP8, group)
    return codes, scales, "group" if group else "token"


def _x_kind(x_scale: Tensor | None, shape: torch.Size, *, dynamic_group: bool) -> str:
    if x_scale is None:
        return "dynamic group" if dynamic_group else "token"
    if is_one(x_scale):
        return "tensor"
    return "token" if tuple(x_scale.shape) == (shape[0], 1) else "group"


def _is_aligned(rows: Tensor) -> bool:
    # The width counts too: a mask that ends within 16 bytes splits them.
    return all(n % 16 == 0 for n in (rows.shape[1], rows.stride(0), rows.storage_offset()))


def _described(rows: Tensor, block: int, config: Fp8Config) -> object:
    """The descriptor from which tiles ``(block, block_k)`` of a tensor are copied."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # absent where triton is

    if rows.stride(0) * rows.element_size() % 16 != 0 or rows.data_ptr() % 16 != 0:
        raise ValueError(
            f"tma needs rows that begin at multiples of 16 bytes; the stride is {rows.stride(0)} "
            f"elements of {rows.element_size()} bytes"
        )
    tile = [block, config.block_k]
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), tile)


def _strides(scales: Tensor | None) -> tuple[int, int]:
    return (0, 0) if scales is None or scales.dim() < 2 else (scales.stride(0), scales.stride(1))


def _check(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    check_shape("x", x, (None, weight.in_features))
    check_dtype("x", x, (*DTYPES, FP8))
    check_last_contiguous("x", x)
    if bias is not None:
        check_shape("bias", bias, (weight.out_features,))
        check_dtype("bias", bias, OUT_DTYPES)
        check_last_contiguous("bias", bias)
    if out_dtype is not None:
        check_choice("out_dtype", out_dtype, OUT_DTYPES)
    if x_scale is None:
        if x.dtype == FP8:
            raise ValueError("x is float8_e4m3fn without x_scale; its codes mean nothing alone")
        return
    check_dtype("x_scale", x_scale, (torch.float32,))
    tokens, groups = (x.shape[0], 1), (x.shape[0], num_groups(x.shape[1]))
    if not is_one(x_scale) and tuple(x_scale.shape) not in (tokens, groups):
        raise ValueError(
            f"x_scale has shape {list(x_scale.shape)}; x {list(x.shape)} takes [1], {list(tokens)} "
            f"or, for groups of 128 columns, {list(groups)}"
        )
