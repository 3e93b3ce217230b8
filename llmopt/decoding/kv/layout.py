"""Which page group a layer's tokens lie in, and how many pages each group gets.

Layers that see everything are one group, every width of sliding window is another. Of an int4
cache a layer lies in two: its quantized pages, and ``recent`` ones in 16 bit that slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmopt.decoding.kv.layers import AttentionLayer
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.paging.groups import PageGroup
from llmopt.errors import BadInputError

RECENT = "recent"


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where one layer's tokens lie.

    Attributes:
        layer: which one.
        group: of all its pages, or of the quantized ones.
        recent: of the latest pages in 16 bit, for int4.
    """

    layer: AttentionLayer
    group: str
    recent: str | None = None


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How large the pools are; one of ``num_pages`` and ``memory_bytes`` is given.

    Attributes:
        num_pages: of a group that keeps all tokens.
        memory_bytes: of all pools together, at most.
        max_sequences: that run at once; windowed groups need no more pages than these use.
        max_tokens_per_step: likewise.
        max_context: most tokens of a sequence; None: what the pools hold.
    """

    num_pages: int | None = None
    memory_bytes: int | None = None
    max_sequences: int = 16
    max_tokens_per_step: int = 512
    max_context: int | None = None


def place_layers(layers: Sequence[AttentionLayer], config: KVCacheConfig) -> tuple[LayerPlace, ...]:
    """The groups of each layer.

    A layer whose window is no wider than int4's 16-bit one never reads a quantized page: it keeps
    16-bit pages alone.
    """
    places = []
    for layer in layers:
        group = "full" if layer.window is None else f"window-{layer.window}"
        quantized = config.kind == "int4" and (
            layer.window is None or layer.window > config.recent_window
        )
        places.append(LayerPlace(layer, group, RECENT if quantized else None))
    return tuple(places)


def page_groups(
    places: Sequence[LayerPlace], config: KVCacheConfig, dtype: torch.dtype, limits: PoolLimits
) -> tuple[PageGroup, ...]:
    """The groups with their numbers of pages.

    Args:
        places: of every layer.
        config: kind and page size.
        dtype: of 16-bit pages.
        limits: what may be used.

    Raises:
        BadInputError: neither or both limits, or less memory than one page of each group.
    """
    if (limits.num_pages is None) == (limits.memory_bytes is None):
        raise BadInputError(
            f"num_pages is {limits.num_pages} and memory_bytes {limits.memory_bytes}",
            "give one of them",
        )
    if limits.num_pages is not None:
        return _groups(places, config, limits, limits.num_pages)
    assert limits.memory_bytes is not None

    def needed(num_pages: int) -> int:
        groups = _groups(places, config, limits, num_pages)
        return sum(g.num_pages * group_page_bytes(places, config, dtype, g.name) for g in groups)

    if needed(1) > limits.memory_bytes:
        raise BadInputError(
            f"{limits.memory_bytes:,} bytes for the cache are less than one page of each of its "
            f"groups takes ({needed(1):,} bytes)",
            "give more memory, a smaller page_size, or a cache of fewer bits",
        )
    low, high = 1, 2
    while needed(high) <= limits.memory_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= limits.memory_bytes else (low, middle)
    return _groups(places, config, limits, low)


def group_page_bytes(
    places: Sequence[LayerPlace], config: KVCacheConfig, dtype: torch.dtype, group: str
) -> int:
    """Bytes of one page in all layers of a group."""
    total = 0
    for place in places:
        layer = place.layer
        channels = config.page_size * layer.num_kv_heads * layer.head_dim
        tokens = config.page_size * layer.num_kv_heads
        if group not in (place.group, place.recent):
            continue
        if config.kind == "int4" and group == place.group and place.recent is not None:
            by_channel = layer.num_kv_heads * layer.head_dim
            total += channels + 2 * 4 * (by_channel + tokens)
        elif config.kind == "int8":
            total += 2 * channels + 2 * 4 * tokens
        elif config.kind == "fp8":
            total += 2 * channels
        else:
            total += 2 * channels * dtype.itemsize
    return total


def _groups(
    places: Sequence[LayerPlace], config: KVCacheConfig, limits: PoolLimits, num_pages: int
) -> tuple[PageGroup, ...]:
    groups: dict[str, PageGroup] = {}
    for place in places:
        window = place.layer.window
        if place.recent is not None:
            groups[RECENT] = _windowed(RECENT, config.recent_window, config, limits, num_pages)
        if window is None:
            groups[place.group] = PageGroup(place.group, None, num_pages, place.recent is not None)
        else:
            groups[place.group] = _windowed(
                place.group, window, config, limits, num_pages, place.recent is not None
            )
    return tuple(groups.values())


def _windowed(
    name: str,
    window: int,
    config: KVCacheConfig,
    limits: PoolLimits,
    num_pages: int,
    full_pages_only: bool = False,
) -> PageGroup:
    """No more pages than the running sequences hold: a window touches a page at either end."""
    page = config.page_size
    held = limits.max_sequences * (-(-window // page) + 2)
    held += -(-limits.max_tokens_per_step // page)
    return PageGroup(name, window, min(num_pages, held), full_pages_only)
