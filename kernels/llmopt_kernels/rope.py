"""Rotary position embedding, in place (RoFormer, arXiv:2104.09864; halves as in Hugging Face).

With ``h = rotary_dim / 2`` and the angle ``a = position * frequency[j]``, channels ``j`` and
``j + h`` of a head become::

    x'[j]     = x[j] * cos(a) - x[j + h] * sin(a)
    x'[j + h] = x[j + h] * cos(a) + x[j] * sin(a)

Channels from ``rotary_dim`` on stay as they are. Computed in float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_kernels.launching import (
    check_dtype,
    check_last_contiguous,
    check_launchable,
    check_shape,
    check_writable,
    launch,
    runs_kernel,
)
from llmopt_kernels.triton_or_stub import tl, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS_PER_PROGRAM = 8


def rope(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, check_values: bool = False
) -> Tensor:
    """Rotate ``x`` in place and return it.

    Args:
        x: ``(tokens, heads, head_dim)`` bfloat16, float16 or float32.
        positions: ``(tokens,)`` int32 or int64, rows of the tables.
        cos: ``(positions, rotary_dim / 2)`` float32.
        sin: likewise.
        check_values: hold that positions are rows of the tables. Waits for the device; for
            debugging.

    Raises:
        ValueError: shape, element type, stride, device or value that does not fit.
    """
    _check(x, positions, cos, sin)
    if check_values:
        check_positions(positions, cos.shape[0])
    if runs_kernel(x):
        launch_rope(x, positions, cos, sin)
    else:
        x.copy_(rope_reference(x, positions, cos, sin, torch.float32))
    return x


def rope_reference(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The rotated ``x`` in ``dtype``, a new tensor."""
    half = cos.shape[1]
    first, second, rest = x.to(dtype).split([half, half, x.shape[2] - 2 * half], -1)
    c = cos[positions.long()].to(dtype)[:, None]
    s = sin[positions.long()].to(dtype)[:, None]
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)


@triton.jit
def _rope_kernel(
    x_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    num_heads,
    stride_token,
    stride_head,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    j = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + j, mask=j < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + j, mask=j < HALF, other=0.0)[None, :]
    mask = (heads < num_heads)[:, None] & (j < HALF)[None, :]
    first_ptr = x_ptr + token * stride_token + heads[:, None] * stride_head + j[None, :]
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(first_ptr + HALF, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=mask)


def launch_rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``x`` in place by the kernel; arguments as of ``rope``.

    Raises:
        ValueError: shape, element type, stride or device that does not fit.
    """
    _check(x, positions, cos, sin)
    check_launchable(x=x, positions=positions, cos=cos, sin=sin)
    num_tokens, num_heads, _ = x.shape
    if num_tokens == 0 or num_heads == 0 or cos.shape[1] == 0:
        return
    block = min(HEADS_PER_PROGRAM, triton.next_power_of_2(num_heads))
    launch(
        _rope_kernel,
        (num_tokens, triton.cdiv(num_heads, block)),
        x,
        positions,
        cos,
        sin,
        num_heads,
        x.stride(0),
        x.stride(1),
        HALF=cos.shape[1],
        BLOCK_HALF=triton.next_power_of_2(cos.shape[1]),
        BLOCK_HEADS=block,
        num_warps=4,
    )


def _check(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_shape("x", x, (None, None, None))
    check_dtype("x", x, DTYPES)
    check_last_contiguous("x", x)
    check_writable("x", x)
    check_rotation(positions, cos, sin, x.shape[0])
    if 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"tables rotate {2 * cos.shape[1]} channels, x has {x.shape[2]}")


def check_rotation(positions: Tensor, cos: Tensor, sin: Tensor, num_tokens: int) -> None:
    """Hold that ``rope``'s positions and tables are what it takes for ``num_tokens`` tokens.

    Raises:
        ValueError: shape, element type or stride that does not fit.
    """
    check_shape("positions", positions, (num_tokens,))
    check_dtype("positions", positions, (torch.int32, torch.int64))
    check_shape("cos", cos, (None, None))
    check_shape("sin", sin, cos.shape)
    for name, table in (("cos", cos), ("sin", sin)):
        check_dtype(name, table, (torch.float32,))
    for name, part in (("positions", positions), ("cos", cos), ("sin", sin)):
        if not part.is_contiguous():
            raise ValueError(f"{name} has strides {part.stride()}; it must be contiguous")


def check_positions(positions: Tensor, num_rows: int) -> None:
    """Hold that every position is a row of tables of ``num_rows``; waits for the device.

    Raises:
        ValueError: one that is not; says which.
    """
    wrong = (positions < 0) | (positions >= num_rows)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise ValueError(
            f"positions[{token}] is {int(positions[token])}; the tables have {num_rows} rows"
        )
