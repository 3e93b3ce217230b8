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
from llmopt.decoding.attention.reading import Scratch, read
from llmopt.decoding.attention.step import Reading, filled_pages, plan_readings, slots_of
from llmopt.decoding.kv.layout import LayerPlace
from llmopt.decoding.kv.store import KVStore, LayerPools
from llmopt.decoding.scheduler import ScheduledStep

_Plan = tuple[Tensor, tuple[Reading, ...], Tensor | None]


class CpuAttention:
    """Answers the layers of one forward; what they share is found at the first of them.

    Args:
        store: the pools.
        step: whose tokens the forward packs.
        scratch: of earlier steps.
    """

    def __init__(self, store: KVStore, step: ScheduledStep, scratch: Scratch | None = None) -> None:
        self._store = store
        self._step = step
        self._scratch = Scratch() if scratch is None else scratch
        self._plans: dict[tuple[str, str | None, int | None], _Plan] = {}
        self._masks: dict[tuple[object, ...], Tensor] = {}

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
        k, v = read(layer, reading, q.dtype, self._scratch)
        if call.softcap is not None or call.sinks is not None:
            visible = None if reading.sees_all else reading.visible()
            return attend_plainly(call, q, k, v, visible)
        kv_heads = k.shape[0]
        heads, queries, head_dim = q.shape
        grouped = q.to(k.dtype).view(kv_heads, -1, queries, head_dim)
        if reading.sees_all:
            folded = grouped.view(1, kv_heads, -1, head_dim)
            out = scaled_dot_product_attention(folded, k[None], v[None], scale=call.scale)
            return out.to(q.dtype).reshape(1, heads, head_dim)
        shape = kv_heads, heads // kv_heads, k.shape[1], head_dim
        k, v = k[:, None].expand(shape), v[:, None].expand(shape)
        mask = None if reading.is_square else self._mask(reading, k.dtype)
        out = scaled_dot_product_attention(
            grouped, k, v, attn_mask=mask, is_causal=mask is None, scale=call.scale
        )
        return out.to(q.dtype).flatten(0, 1).transpose(0, 1)

    def _mask(self, reading: Reading, dtype: torch.dtype) -> Tensor:
        key = reading.start, reading.num_queries, reading.first, reading.window, dtype
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
    folded = q.to(k.dtype).reshape(kv_heads, -1, head_dim)
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
    return out.to(q.dtype).view(heads, queries, head_dim).transpose(0, 1)
