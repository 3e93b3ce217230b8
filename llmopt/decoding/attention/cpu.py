"""Attention of one step on a CPU: torch's own over views of the pools.

The query heads that share a KV head are rows of one matrix (a decode), or share a view of their
keys that is expanded, not repeated (a chunk). A sequence whose pages are consecutive is read where
it lies; others, and codes, are copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt.decoding.attention.hook import Call
from llmopt.decoding.attention.step import Reading, Span, filled_pages, plan_readings, slots_of
from llmopt.decoding.kv.codes import decode_fp8, decode_int4, decode_int8
from llmopt.decoding.kv.layout import LayerPlace
from llmopt.decoding.kv.store import KVStore, LayerPools, Pool
from llmopt.decoding.scheduler import ScheduledStep

_Plan = tuple[Tensor, tuple[Reading, ...], Tensor | None]


class CpuAttention:
    """Answers the layers of one forward; what they share is found at the first of them.

    Args:
        store: the pools.
        step: whose tokens the forward packs.
    """

    def __init__(self, store: KVStore, step: ScheduledStep) -> None:
        self._store = store
        self._step = step
        self._plans: dict[tuple[str, str | None, int | None], _Plan] = {}
        self._masks: dict[tuple[int, int, int, int | None], Tensor] = {}

    def __call__(self, call: Call) -> Tensor:
        """Write the new tokens, then attend: ``(tokens, heads, head_dim)``."""
        layer = self._store.layers[call.layer]
        slots, readings, filled = self._plan(layer.place)
        self._store.write(layer, slots, call.k, call.v)
        if filled is not None:
            self._store.quantize_pages(layer, filled[:, 0], filled[:, 1])
        parts = [self._attend(call, layer, reading) for reading in readings]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _plan(self, place: LayerPlace) -> _Plan:
        key = place.group, place.recent, place.layer.window
        plan = self._plans.get(key)
        if plan is None:
            chunks, config = self._step.chunks, self._store.config
            written = place.recent or place.group
            slots = [s for chunk in chunks for s in slots_of(chunk, written, config.page_size)]
            filled = []
            if place.recent is not None:
                filled = [
                    pair
                    for chunk in chunks
                    for pair in filled_pages(chunk, place, config.page_size)
                ]
            plan = (
                torch.tensor(slots),
                plan_readings(chunks, place, config),
                torch.tensor(filled) if filled else None,
            )
            self._plans[key] = plan
        return plan

    def _attend(self, call: Call, layer: LayerPools, reading: Reading) -> Tensor:
        q = call.q[:, reading.rows]
        k, v = read(layer, reading, q.dtype)
        if call.softcap is not None or call.sinks is not None:
            return attend_plainly(call, q, k, v, None if reading.sees_all else reading.visible())
        kv_heads = k.shape[0]
        heads, queries, head_dim = q.shape
        if reading.sees_all:
            folded = q.reshape(1, kv_heads, heads // kv_heads, head_dim)
            out = scaled_dot_product_attention(folded, k[None], v[None], scale=call.scale)
            return out.reshape(1, heads, head_dim)
        grouped = q.view(kv_heads, -1, queries, head_dim)
        shape = kv_heads, heads // kv_heads, k.shape[1], head_dim
        k, v = k[:, None].expand(shape), v[:, None].expand(shape)
        mask = None if reading.is_square else self._mask(reading, q.dtype)
        out = scaled_dot_product_attention(
            grouped, k, v, attn_mask=mask, is_causal=mask is None, scale=call.scale
        )
        return out.flatten(0, 1).transpose(0, 1)

    def _mask(self, reading: Reading, dtype: torch.dtype) -> Tensor:
        key = reading.start, reading.num_queries, reading.first, reading.window
        mask = self._masks.get(key)
        if mask is None:
            visible = reading.visible()
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
            self._masks[key] = mask
        return mask


def attend_plainly(call: Call, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention with what torch's own lacks, a soft cap and sinks; the softmax in float32.

    Args:
        call: scale, soft cap, sinks.
        q: ``(heads, queries, head_dim)``.
        k: ``(kv_heads, tokens, head_dim)``.
        v: likewise.
        visible: ``(queries, tokens)`` bool; None is all.

    Returns:
        ``(queries, heads, head_dim)``.
    """
    heads, queries, head_dim = q.shape
    kv_heads = k.shape[0]
    folded = q.reshape(kv_heads, -1, head_dim)
    scores = (folded @ k.transpose(1, 2)).float().view(heads, queries, -1) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if call.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = call.sinks.float()[:, None, None].expand(heads, queries, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    out = weights.to(v.dtype).reshape(kv_heads, -1, k.shape[1]) @ v
    return out.view(heads, queries, head_dim).transpose(0, 1)


def read(layer: LayerPools, reading: Reading, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values that are read, in ``dtype``: twice ``(kv_heads, tokens, head_dim)``."""
    parts = [
        _read_span(layer.pool if not span.recent else layer.written, span, dtype)
        for span in reading.spans
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)


def _read_span(pool: Pool, span: Span, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if pool.kind == "int4":
        return _read_int4(pool, span, dtype)
    k, v = _tokens(pool.k, span, pool), _tokens(pool.v, span, pool)
    if pool.kind == "16-bit":
        return k.to(dtype), v.to(dtype)
    k_scale, v_scale = pool.pages.k_scale, pool.pages.v_scale
    assert k_scale is not None and v_scale is not None
    if pool.kind == "fp8":
        return decode_fp8(k, k_scale[:, None], dtype), decode_fp8(v, v_scale[:, None], dtype)
    k_scale, v_scale = (
        _tokens(scale.view(-1, scale.shape[-1]).T[..., None], span, pool)[..., 0]
        for scale in (k_scale, v_scale)
    )
    return decode_int8(k, k_scale, dtype), decode_int8(v, v_scale, dtype)


def _tokens(by_token: Tensor, span: Span, pool: Pool) -> Tensor:
    """A span of ``(kv_heads, pool tokens, channels)``: a view where its pages are consecutive."""
    if span.pages is None:
        return by_token[:, span.begin : span.begin + span.length]
    pages = by_token.view(len(by_token), -1, pool.pages.page_size, by_token.shape[-1])[
        :, span.pages
    ]
    return pages.flatten(1, 2)[:, span.offset : span.offset + span.length]


def _read_int4(pool: Pool, span: Span, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    page_size = pool.pages.page_size
    at: slice | Tensor
    if span.pages is None:
        first, offset = divmod(span.begin, page_size)
        at = slice(first, -(-(span.begin + span.length) // page_size))
    else:
        at, offset = span.pages, span.offset
    p = pool.pages
    assert p.k_scale is not None and p.k_min is not None
    assert p.v_scale is not None and p.v_min is not None
    k = decode_int4(p.k[at], p.k_scale[at][:, None], p.k_min[at][:, None], dtype)
    v = decode_int4(p.v[at], p.v_scale[at][..., None], p.v_min[at][..., None], dtype)
    tokens = slice(offset, offset + span.length)
    return (
        k.permute(2, 0, 1, 3).flatten(1, 2)[:, tokens],
        v.permute(2, 0, 1, 3).flatten(1, 2)[:, tokens],
    )
