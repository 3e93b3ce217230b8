"""Attention of a transformers model that sees keys and values through somebody's eyes.

transformers looks its attention up by a name in the config. While :func:`attention_through` lasts
that name is ours, and what keys and values a layer attends to is the caller's to say. Ours is the
formula, softcap and sinks included, so that it serves every architecture alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmopt.kv_cache.reading import CacheView

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

See = Callable[[int, Tensor, Tensor], CacheView]
"""``(layer, keys, values) -> what its queries read``; ``(batch, kv_heads, tokens, head_dim)``."""

_NAME = "llmopt_cache"
_SCORES = 1 << 24  # float32 elements of attention scores in memory at a time, 64 MiB
_SEE: ContextVar[See] = ContextVar("llmopt_cache_see")


@contextmanager
def attention_through(config: PreTrainedConfig, see: See) -> Iterator[None]:
    """Let the attention of every module with this config read what ``see`` gives."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = config._attn_implementation
    name = f"{_NAME}_{usual}"
    # Masks stay what they are without us: the walker keeps them from one forward to the next.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    ALL_ATTENTION_FUNCTIONS.register(name, _attention)
    token = _SEE.set(see)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual
        _SEE.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """As transformers calls it; ``(batch, tokens, heads, head_dim)`` comes back."""
    assert position_bias is None, "no decoder of the road adds a bias by position"
    layer = module.layer_idx
    assert isinstance(layer, int)
    view = _SEE.get()(layer, key, value)
    if attention_mask is not None:
        # Cut to the keys: a mask may be made longer than they are.
        attention_mask = attention_mask[..., : key.shape[2]][..., view.positions]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = attend(query, view, attention_mask, scale, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def attend(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by the formula, a few queries at a time.

    Args:
        query: ``(batch, heads, tokens, head_dim)``.
        view: what the queries read.
        mask: ``(batch or 1, 1, tokens, columns)``, boolean or additive; ``None`` is causal.
        scale: of the scores.
        softcap: ``softcap * tanh(scores / softcap)`` before the mask.
        sinks: ``(heads,)``, a logit each beside the scores.

    Returns:
        ``(batch, heads, tokens, head_dim)``.
    """
    if softcap is None and sinks is None:
        return _fused(query, view, mask, scale)
    batch, heads, num_tokens, head_dim = query.shape
    kv_heads, num_columns = view.keys.shape[1:3]
    # The queries of a group lie behind one another, so that keys are not repeated for them.
    grouped = query.reshape(batch, kv_heads, -1, num_tokens, head_dim)
    step = max(1, _SCORES // (batch * heads * num_columns))
    parts = []
    for first in range(0, num_tokens, step):
        rows = slice(first, min(first + step, num_tokens))
        q = grouped[:, :, :, rows]
        scores = q.flatten(2, 3) @ view.keys.transpose(2, 3) * scale
        scores = scores.reshape(*q.shape[:4], num_columns)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + _added(view, mask, rows, scores.dtype)[:, :, None]
        if sinks is not None:
            own = sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1)
            scores = torch.cat([scores, own.expand(batch, -1, -1, scores.shape[3], 1)], -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        read = weights[..., :num_columns].flatten(2, 3) @ view.values
        parts.append(read.reshape(*q.shape[:4], -1))
    return torch.cat(parts, 3).flatten(1, 2)


def _fused(query: Tensor, view: CacheView, mask: Tensor | None, scale: float) -> Tensor:
    """The same by torch's own attention, which has neither softcap nor sinks but is faster."""
    is_causal = mask is None and view.reads is None
    whole = slice(0, query.shape[2])
    added = None if is_causal else _added(view, mask, whole, query.dtype)
    return functional.scaled_dot_product_attention(
        query,
        view.keys,
        view.values,
        attn_mask=added,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
    )


def _added(view: CacheView, mask: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    """``(batch or 1, 1, rows, columns)``: zero where a query reads a column."""
    positions, lowest = view.positions, torch.finfo(dtype).min
    zero = torch.zeros((), dtype=dtype, device=positions.device)
    if mask is None:
        queries = torch.arange(rows.start, rows.stop, device=positions.device)
        added = torch.where(positions <= queries[:, None], zero, lowest)[None, None]
    elif mask.dtype == torch.bool:
        added = torch.where(mask[:, :, rows], zero, lowest)
    else:
        added = mask[:, :, rows].to(dtype)
    if view.reads is not None:
        added = torch.where(view.reads[rows], added, lowest)
    return added
