"""Reads what a step sees out of the pools on a CPU: a view where it can, decoded where it must.

Codes become float32 in memory that is kept from layer to layer and from step to step: at long
contexts, asking for it anew costs several times what the decoding itself does.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from llmopt.decoding.attention.step import Reading, Span
from llmopt.decoding.kv.codes import fp8_to_half
from llmopt.decoding.kv.store import LayerPools, Pool


class Scratch:
    """Memory for decoded keys and values, as much as was ever asked for."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor; the next one of this name and type lies in the same memory."""
        size = prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = torch.empty(size + size // 4, dtype=dtype)
            self._held[name, dtype] = held
        return held[:size].view(shape)


def read(
    layer: LayerPools, reading: Reading, dtype: torch.dtype, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Keys and values that a reading sees: twice ``(kv_heads, tokens, head_dim)``.

    Args:
        layer: the pools.
        reading: of one sequence.
        dtype: of the queries.
        scratch: what is not a view of a pool lies there, until the next call.

    Returns:
        In ``dtype`` where the pool holds that, else decoded to float32.
    """
    spans = reading.spans
    if len(spans) == 1:
        pool = layer.written if spans[0].recent else layer.pool
        if pool.kind == "16-bit" and pool.k.dtype == dtype:
            return (
                _tokens(pool.k, spans[0], pool, scratch, "k"),
                _tokens(pool.v, spans[0], pool, scratch, "v"),
            )
    heads, head_dim = layer.written.k.shape[0], layer.place.layer.head_dim
    shape = heads, reading.num_tokens, head_dim
    k, v = (scratch.take(f"all-{name}", shape, torch.float32) for name in "kv")
    begin = 0
    for span in spans:
        pool = layer.written if span.recent else layer.pool
        part = slice(begin, begin + span.length)
        _decode(pool, span, k[:, part], v[:, part], scratch)
        begin += span.length
    return k, v


def _decode(pool: Pool, span: Span, k: Tensor, v: Tensor, scratch: Scratch) -> None:
    """Write one span's float32 values into ``k`` and ``v``."""
    p = pool.pages
    if pool.kind == "int4":
        assert p.k_scale is not None and p.k_min is not None
        assert p.v_scale is not None and p.v_min is not None
        _decode_int4(p.k, p.k_scale[:, None], p.k_min[:, None], span, k, scratch)
        _decode_int4(p.v, p.v_scale[..., None], p.v_min[..., None], span, v, scratch)
        return
    for name, out, codes, scale in (("k", k, pool.k, p.k_scale), ("v", v, pool.v, p.v_scale)):
        x = _tokens(codes, span, pool, scratch, name)
        if pool.kind == "16-bit" or scale is None:
            out.copy_(x)
        elif pool.kind == "fp8":
            out.copy_(fp8_to_half(x, scratch.take("bits", tuple(x.shape), torch.int16)))
            out.mul_(scale[:, None, None] * 256)
        else:
            out.copy_(x)
            by_head = scale.view(-1, scale.shape[-1]).T[..., None]
            out.mul_(_tokens(by_head, span, pool, scratch, f"{name}-scale"))


def _tokens(by_token: Tensor, span: Span, pool: Pool, scratch: Scratch, name: str) -> Tensor:
    """A span of ``(kv_heads, pool tokens, channels)``: a view where its pages are consecutive."""
    if span.pages is None:
        return by_token[:, span.begin : span.begin + span.length]
    heads, _, channels = by_token.shape
    page_size = pool.pages.page_size
    by_page = by_token.view(heads, -1, page_size, channels)
    dtype = by_token.dtype
    if dtype == torch.float8_e4m3fn:  # torch gathers bytes
        by_page, dtype = by_page.view(torch.uint8), torch.uint8
    out = scratch.take(name, (heads, len(span.pages), page_size, channels), dtype)
    torch.index_select(by_page, 1, span.pages, out=out)
    gathered = out.view(by_token.dtype).view(heads, -1, channels)
    return gathered[:, span.offset : span.offset + span.length]


def _decode_int4(
    codes: Tensor, scale: Tensor, minimum: Tensor, span: Span, out: Tensor, scratch: Scratch
) -> None:
    """``codes (pages, page_size, kv_heads, head_dim / 2)``; scale and minimum broadcast."""
    page_size = codes.shape[1]
    pages: slice | Tensor
    if span.pages is None:
        first, offset = divmod(span.begin, page_size)
        pages = slice(first, -(-(span.begin + span.length) // page_size))
    else:
        pages, offset = span.pages, span.offset
    packed, scale, minimum = (x[pages].permute(2, 0, 1, 3) for x in (codes, scale, minimum))
    heads, count, _, half = packed.shape
    back = scratch.take("int4", (heads, count, page_size, 2 * half), torch.float32)
    back[..., :half] = packed & 15
    back[..., half:] = packed >> 4
    back.mul_(scale).add_(minimum)
    out.copy_(back.view(heads, -1, 2 * half)[:, offset : offset + span.length])
