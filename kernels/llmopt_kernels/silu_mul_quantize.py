"""A gated activation (SwiGLU or GeGLU, arXiv:2002.05202) and the quantization after it.

Of a token's row ``[gate | up]``, the output of one fused projection::

    y   = act(gate) * up
    out = y in 16 bit, or round(y / scale) in fp8 or int8

    silu(g)      = g * sigmoid(g)
    gelu_tanh(g) = g * sigmoid(2 * sqrt(2 / pi) * (g + 0.044715 * g**3))

The second is GELU's tanh form, with ``(1 + tanh(u)) / 2 = sigmoid(2 * u)``. All is float32 to the
output, rounded once. ``scale`` is ``max(|y|) / MAX`` of each token (dynamic), or for fp8 one number
that is given. A dynamic scale takes the whole row: what does not fit in registers is read and
computed twice, the second time mostly from cache.
"""

from __future__ import annotations

from typing import Literal

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
from llmopt_kernels.quantize_rows import largest_magnitude
from llmopt_kernels.row_output import (
    HALF_DTYPES,
    check_output,
    dynamic_scale,
    encode,
    larger,
    new_output,
    rows_reference,
    scaling,
)
from llmopt_kernels.triton_or_stub import tl, triton

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS = ("silu", "gelu_tanh")
MAX_BLOCK = 8192
"""Channels of a program that has the whole row to itself."""
SPLIT_BLOCK = 1024
"""Channels of a program where a row needs no scale and is split."""


def silu_mul_quantize(
    gate_up: Tensor,
    *,
    activation: Activation = "silu",
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``act(gate) * up`` of every row.

    Args:
        gate_up: ``(tokens, 2 * n)`` bfloat16 or float16, gate first, any stride between rows.
        activation: "silu" or "gelu_tanh".
        dtype: of the output: bfloat16, float16, float8_e4m3fn or int8; ``None`` for the input's.
        scale: one float32, the static scale of an fp8 output; ``None`` for dynamic scales.

    Returns:
        ``(tokens, n)`` of ``dtype``, and its scales: ``(tokens, 1) float32`` dynamic, the given
        one static, ``None`` for 16 bit.

    Raises:
        ValueError: shape, element type, stride, device or activation that does not fit.
    """
    dtype = gate_up.dtype if dtype is None else dtype
    _check(gate_up, activation, dtype, scale)
    if runs_kernel(gate_up):
        return launch_silu_mul_quantize(gate_up, activation=activation, dtype=dtype, scale=scale)
    y, scales = silu_mul_quantize_reference(
        gate_up, activation=activation, dtype=dtype, scale=scale, compute=torch.float32
    )
    return y.to(dtype), scales


def silu_mul_quantize_reference(
    gate_up: Tensor,
    *,
    activation: Activation = "silu",
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """As ``silu_mul_quantize``, in ``compute``; where that rounds to 16 bit, this does not."""
    gate, up = gate_up.to(compute).chunk(2, -1)
    if activation == "silu":
        activated = torch.nn.functional.silu(gate)
    else:
        activated = torch.nn.functional.gelu(gate, approximate="tanh")
    return rows_reference(activated * up, gate_up.dtype if dtype is None else dtype, scale)


@triton.jit
def _activated(gate_ptrs, up_ptrs, mask, ACTIVATION: tl.constexpr):
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        slope = gate
    else:  # 2 * sqrt(2 / pi)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(slope) * up


@triton.jit
def _silu_mul_quantize_kernel(
    gate_up_ptr,
    out_ptr,
    scale_ptr,
    n,
    stride_token,
    ACTIVATION: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    gate_ptr = gate_up_ptr + token * stride_token
    up_ptr = gate_ptr + n
    out_ptr += token * n
    ELEMENT: tl.constexpr = out_ptr.dtype.element_ty
    j = tl.arange(0, BLOCK)
    if SCALING != "dynamic":
        j += tl.program_id(1) * BLOCK
        y = _activated(gate_ptr + j, up_ptr + j, j < n, ACTIVATION)
        scale = 1.0
        if SCALING == "static":
            scale = tl.load(scale_ptr)
        tl.store(out_ptr + j, encode(y, scale, ELEMENT), mask=j < n)
    elif WHOLE:
        y = _activated(gate_ptr + j, up_ptr + j, j < n, ACTIVATION)
        scale = dynamic_scale(largest_magnitude(y, 0), ELEMENT)
        tl.store(scale_ptr + token, scale)
        tl.store(out_ptr + j, encode(y, scale, ELEMENT), mask=j < n)
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            i = start + j
            y = _activated(gate_ptr + i, up_ptr + i, i < n, ACTIVATION)
            largest = larger(largest, tl.abs(y))
        scale = dynamic_scale(largest_magnitude(largest, 0), ELEMENT)
        tl.store(scale_ptr + token, scale)
        for start in range(0, n, BLOCK):
            i = start + j
            y = _activated(gate_ptr + i, up_ptr + i, i < n, ACTIVATION)
            tl.store(out_ptr + i, encode(y, scale, ELEMENT), mask=i < n)


def launch_silu_mul_quantize(
    gate_up: Tensor,
    *,
    activation: Activation = "silu",
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``silu_mul_quantize``, by the kernel.

    Raises:
        ValueError: shape, element type, stride, device or activation that does not fit.
    """
    dtype = gate_up.dtype if dtype is None else dtype
    _check(gate_up, activation, dtype, scale)
    check_launchable(gate_up=gate_up, scale=scale)
    check_chip_has("dtype", dtype, gate_up.device)
    num_tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out, scales = new_output(num_tokens, n, dtype, scale, gate_up)
    if num_tokens == 0:
        return out, scales
    kind = scaling(dtype, scale)
    block = min(MAX_BLOCK if kind == "dynamic" else SPLIT_BLOCK, triton.next_power_of_2(n))
    launch(
        _silu_mul_quantize_kernel,
        (num_tokens, 1 if kind == "dynamic" else triton.cdiv(n, block)),
        gate_up,
        out,
        scales,
        n,
        gate_up.stride(0),
        ACTIVATION=activation,
        SCALING=kind,
        BLOCK=block,
        WHOLE=n <= block,
        # 8 channels a thread where a row is split, 16 where a program has it whole.
        num_warps=max(1, block // (512 if kind == "dynamic" else 256)),
    )
    return out, scales


def _check(gate_up: Tensor, activation: str, dtype: torch.dtype, scale: Tensor | None) -> None:
    check_shape("gate_up", gate_up, (None, None))
    check_dtype("gate_up", gate_up, HALF_DTYPES)
    check_last_contiguous("gate_up", gate_up)
    if gate_up.shape[1] == 0 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns; two halves are needed")
    check_choice("activation", activation, ACTIVATIONS)
    check_output(dtype, scale)
