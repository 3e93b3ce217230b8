"""Keys and values to codes and back, in any element type: the formulas of ``llmopt_kernels``.

The kernels' operations take 16-bit models alone; a CPU also serves float32 ones. A test holds that
both give the same codes. Tokens are ``(..., tokens, head_dim)`` with scales that broadcast, pages
``(pages, page_size, kv_heads, head_dim)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_kernels.paged_kv import pack_nibbles, unpack_nibbles
from llmopt_kernels.rounding import quantize, row_scale

LEVELS = 15
KEY_AXIS = 1
"""Tokens of a page share a key channel's scale."""
VALUE_AXIS = 3
"""Channels share a value token's scale."""


def encode_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Codes of ``x (kv_heads, tokens, head_dim)``, ``scale (kv_heads, 1)``; saturates at +-448."""
    return quantize(x.float(), scale[..., None], torch.float8_e4m3fn)


def encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127..127 and a float32 scale a row, ``max(|x|) / 127``, 1 where that is 0."""
    x = x.float()
    scale = row_scale(x, torch.int8)
    return quantize(x, scale, torch.int8), scale[..., 0]


def encode_int4(pages: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and minima of full pages (KIVI, arXiv:2402.02750).

    Args:
        pages: ``(pages, page_size, kv_heads, head_dim)``.
        axis: what shares a scale: ``KEY_AXIS`` or ``VALUE_AXIS``.

    Returns:
        ``(pages, page_size, kv_heads, head_dim / 2) uint8``, and twice float32 without the axis.
    """
    x = pages.float()
    minimum, maximum = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale = (maximum - minimum) / LEVELS
    # A NaN has no code; its scale is NaN, and so is what comes back.
    code = torch.where(scale == 0, 0.0, (x - minimum) / scale).nan_to_num(0.0)
    packed = pack_nibbles(code.round().clamp(0, LEVELS))
    return packed, scale.squeeze(axis), minimum.squeeze(axis)


def fp8_to_half(codes: Tensor, bits: Tensor | None = None) -> Tensor:
    """``code / 256`` in float16, exactly: e4m3's exponent and mantissa fit into float16's.

    With the sign extended over 16 bits, a shift by 7 brings each field to its place, a bias of 15
    instead of 7 divides by 256, and subnormals stay right. torch's own conversion on a CPU takes
    15 times as long.

    Args:
        codes: e4m3, of any shape.
        bits: int16 of that shape, to hold the result; None makes one.
    """
    codes = codes.view(torch.int8)
    bits = torch.empty_like(codes, dtype=torch.int16) if bits is None else bits
    half = bits.copy_(codes).bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)
    strange = codes & 127 == 127
    return half.masked_fill_(strange, torch.nan) if bool(strange.any()) else half


def decode_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * scale``, rounded once to ``dtype``; ``scale (kv_heads, 1)``."""
    return fp8_to_half(codes).float().mul_(scale[..., None] * 256).to(dtype)


def decode_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * scale``, rounded once to ``dtype``; a scale a row."""
    return (codes * scale[..., None]).to(dtype)


def decode_int4(packed: Tensor, scale: Tensor, minimum: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * scale + minimum``, rounded once to ``dtype``; the latter two broadcast."""
    return torch.addcmul(minimum, unpack_nibbles(packed).float(), scale).to(dtype)
