"""Keys and values of whole sequences as a quantized cache would give them back.

The codes are those of ``llmopt_kernels``: its references write the cache and read it, so that
there is one definition. What is added here is who reads what. Of fp8 and int8 a query reads all
positions from codes, its own too. Of int4 (KIVI, arXiv:2402.02750) the query at position ``p``
reads positions below ``boundary(p) = floor(max(0, p + 1 - W) / page) * page`` from codes, and the
others in 16 bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.kv_cache.settings import KVCacheSettings
from llmopt_kernels.kv_cache_write import WriteProblem, kv_cache_write_reference
from llmopt_kernels.kv_page_quantize import quantize_pages_reference
from llmopt_kernels.paged_kv import PagedKV, dequantize_pages, new_cache


@dataclass(frozen=True, slots=True)
class LayerScales:
    """Static scales of a layer, one for all heads as vLLM has them; of fp8 only."""

    k: float = 1.0
    v: float = 1.0


@dataclass(frozen=True, slots=True)
class KVCache:
    """A quantized cache of a model.

    Attributes:
        settings: of a quantized kind.
        scales: of fp8, a pair a layer; empty of the other kinds.
    """

    settings: KVCacheSettings
    scales: tuple[LayerScales, ...] = ()

    def see(self, layer: int, keys: Tensor, values: Tensor) -> CacheView:
        """What queries at positions 0, 1, ... of a layer read; see :func:`read_back`."""
        scales = self.scales[layer] if self.scales else LayerScales()
        return read_back(keys, values, self.settings, scales)


@dataclass(frozen=True, slots=True, eq=False)
class CacheView:
    """What the queries of a batch read.

    Attributes:
        keys: ``(batch, kv_heads, columns, head_dim)``.
        values: likewise.
        positions: ``(columns,) int64``, the token that a column holds.
        reads: ``(tokens, columns) bool``, which query reads which column if its mask lets it see
            the token; ``None`` if every query reads every column.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    reads: Tensor | None


def boundary(num_tokens: int, settings: KVCacheSettings) -> Tensor:
    """``(num_tokens,) int64``: below which position each query reads int4 codes."""
    seen = torch.arange(1, num_tokens + 1) - settings.recent_window
    return seen.clamp(min=0) // settings.page_size * settings.page_size


def read_back(
    keys: Tensor, values: Tensor, settings: KVCacheSettings, scales: LayerScales
) -> CacheView:
    """What queries at positions 0, 1, ... read of a layer's keys and values.

    Args:
        keys: ``(batch, kv_heads, tokens, head_dim)``, after the rotary embedding.
        values: likewise.
        settings: of a quantized kind.
        scales: of fp8.
    """
    num_tokens = keys.shape[2]
    every = torch.arange(num_tokens, device=keys.device)
    if settings.kind in ("fp8", "int8"):
        k, v = _written(keys, values, settings, scales)
        return CacheView(k, v, every, None)
    assert settings.kind == "int4", "a 16-bit cache gives back what it is given"
    k, v = _quantized_pages(keys, values, settings.page_size)
    first = boundary(num_tokens, settings).to(keys.device)[:, None]
    in_codes = every[: k.shape[2]]
    return CacheView(
        keys=torch.cat([k, keys], 2),
        values=torch.cat([v, values], 2),
        positions=torch.cat([in_codes, every]),
        reads=torch.cat([in_codes < first, every >= first], 1),
    )


def _written(
    keys: Tensor, values: Tensor, settings: KVCacheSettings, scales: LayerScales
) -> tuple[Tensor, Tensor]:
    """Through an fp8 or int8 pool that holds the batch's tokens one after the other."""
    batch, heads, num_tokens, head_dim = keys.shape
    page_size = settings.page_size
    num_pages = -(-batch * num_tokens // page_size)
    assert settings.kind in ("fp8", "int8")
    cache = new_cache(settings.kind, num_pages, page_size, heads, head_dim, device=keys.device)
    if cache.kind == "fp8":
        assert cache.k_scale is not None and cache.v_scale is not None
        cache.k_scale.fill_(scales.k)
        cache.v_scale.fill_(scales.v)
    slots = torch.arange(batch * num_tokens, device=keys.device)
    problem = WriteProblem(_by_token(keys), _by_token(values), slots, cache)
    kv_cache_write_reference(problem, torch.float32)
    k, v = _by_position(cache, slice(0, batch * num_tokens), keys.dtype)
    shape = (batch, num_tokens, heads, head_dim)
    return k.reshape(shape).transpose(1, 2), v.reshape(shape).transpose(1, 2)


def _quantized_pages(keys: Tensor, values: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Every full page of every sequence through int4; ``(batch, kv_heads, full tokens, head_dim)``.

    A page that right-hand padding fills up is full here, and no query of a true token reads it.
    """
    batch, heads, num_tokens, head_dim = keys.shape
    full = num_tokens // page_size * page_size
    pages = torch.arange(batch * full // page_size, device=keys.device)
    shape = (len(pages), page_size, heads, head_dim)
    k, v = (_by_token(x[:, :, :full]).reshape(shape) for x in (keys, values))
    cache = new_cache("int4", len(pages), page_size, heads, head_dim, device=keys.device)
    if len(pages):
        quantize_pages_reference(k.float(), v.float(), cache, pages)
    found = _by_position(cache, slice(0, batch * full), keys.dtype)
    k, v = (x.reshape(batch, full, heads, head_dim).transpose(1, 2) for x in found)
    return k, v


def _by_token(x: Tensor) -> Tensor:
    """``(batch, heads, tokens, head_dim)`` to ``(batch * tokens, heads, head_dim)``."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_position(cache: PagedKV, slots: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pages = torch.arange(cache.num_pages, device=cache.k.device)
    k, v = dequantize_pages(cache, pages, torch.float32)
    return k.flatten(0, 1)[slots].to(dtype), v.flatten(0, 1)[slots].to(dtype)
