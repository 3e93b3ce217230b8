"""The pools' tensors, layer by layer: made, written and copied.

Views have the shape that ``llmopt_kernels.paged_kv`` names, ``(pages, page_size, kv_heads,
head_dim)``; in memory the heads come first. So the tokens of consecutive pages are one matrix a
head, which torch's attention reads twice as fast on a CPU as rows that are a token apart, and the
kernels take any strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.decoding.kv.codes import (
    KEY_AXIS,
    VALUE_AXIS,
    encode_fp8,
    encode_int4,
    encode_int8,
)
from llmopt.decoding.kv.layers import AttentionLayer
from llmopt.decoding.kv.layout import LayerPlace
from llmopt.decoding.kv_cache_config import HeadScales, KVCacheConfig
from llmopt.decoding.paging.groups import PageCopy, PageGroup
from llmopt.errors import BadInputError
from llmopt_kernels.paged_kv import Kind, PagedKV


@dataclass(frozen=True, slots=True)
class Pool:
    """One layer's pages in one group.

    Attributes:
        kind: of its codes; ``16-bit`` stands for the model's element type, float32 too.
        pages: as the kernels see them.
        k: ``(kv_heads, num_pages * page_size, channels)``, the same memory token by token.
        v: likewise.
    """

    kind: Kind
    pages: PagedKV
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Keep the views by token: slicing them is all that a read on a CPU costs."""
        for name in ("k", "v"):
            by_token = getattr(self.pages, name).permute(2, 0, 1, 3).flatten(1, 2)
            object.__setattr__(self, name, by_token)

    @property
    def num_bytes(self) -> int:
        """Of codes, scales and minima."""
        parts = self.pages.tensors().values()
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class LayerPools:
    """One layer's pools.

    Attributes:
        place: the layer and its groups.
        pool: of all its tokens, or of its int4 pages.
        recent: 16-bit pages beside int4 ones.
    """

    place: LayerPlace
    pool: Pool
    recent: Pool | None = None

    @property
    def written(self) -> Pool:
        """The pool that new tokens go to."""
        return self.pool if self.recent is None else self.recent


class KVStore:
    """The cache of a model: pools of every layer, all pages empty at first.

    Args:
        places: of every layer.
        groups: with their numbers of pages.
        config: kind, page size, scales.
        dtype: of 16-bit pages.
        device: where they lie.

    Raises:
        BadInputError: fp8 scales that do not fit the layers.
    """

    def __init__(
        self,
        places: Sequence[LayerPlace],
        groups: Sequence[PageGroup],
        config: KVCacheConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        num_pages = {group.name: group.num_pages for group in groups}
        self.layers: Mapping[int, LayerPools] = {
            place.layer.index: _layer_pools(place, num_pages, config, dtype, device)
            for place in places
        }
        for index, scales in (config.fp8_scales or {}).items():
            self._set_scales(index, scales)

    def write(self, layer: LayerPools, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put new tokens into their slots, encoded.

        Args:
            layer: whose they are.
            slots: ``(tokens,) int64``, ``page * page_size + offset`` in the layer's written group.
            k: ``(kv_heads, tokens, head_dim)``, rotated.
            v: likewise.
        """
        pool = layer.written
        if pool.kind == "16-bit":
            pool.k.index_copy_(1, slots, k.to(pool.k.dtype))
            pool.v.index_copy_(1, slots, v.to(pool.v.dtype))
            return
        for x, codes, scale in ((k, pool.k, pool.pages.k_scale), (v, pool.v, pool.pages.v_scale)):
            assert scale is not None
            if pool.kind == "fp8":
                encoded = encode_fp8(x, scale[:, None])
                codes.view(torch.uint8).index_copy_(1, slots, encoded.view(torch.uint8))
            else:
                encoded, found = encode_int8(x)
                codes.index_copy_(1, slots, encoded)
                scale.view(-1, scale.shape[-1]).index_copy_(0, slots, found.T)

    def quantize_pages(self, layer: LayerPools, sources: Tensor, targets: Tensor) -> None:
        """Quantize full recent pages into int4 ones; page numbers ``(n,) int64``."""
        assert layer.recent is not None
        source, target = layer.recent.pages, layer.pool.pages
        parts = (
            (source.k, KEY_AXIS, target.k, target.k_scale, target.k_min),
            (source.v, VALUE_AXIS, target.v, target.v_scale, target.v_min),
        )
        for x, axis, codes, scales, minima in parts:
            assert scales is not None and minima is not None
            codes[targets], scales[targets], minima[targets] = encode_int4(x[sources], axis)

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Copy pages of a group in every layer of it, in order."""
        for copy in copies:
            for layer in self.layers.values():
                if copy.group == layer.place.group:
                    _copy_page(layer.pool.pages, copy)
                if layer.recent is not None and copy.group == layer.place.recent:
                    _copy_page(layer.recent.pages, copy)

    def num_bytes(self, group: str | None = None) -> int:
        """Bytes of all pools, or of those in one group, measured from the tensors."""
        total = 0
        for layer in self.layers.values():
            if group in (None, layer.place.group):
                total += layer.pool.num_bytes
            if layer.recent is not None and group in (None, layer.place.recent):
                total += layer.recent.num_bytes
        return total

    def _set_scales(self, index: int, scales: HeadScales) -> None:
        if index not in self.layers:
            raise BadInputError(
                f"fp8_scales name layer {index}; the model's attention layers are "
                f"{min(self.layers)} to {max(self.layers)}",
                "leave that layer out",
            )
        pages = self.layers[index].pool.pages
        for name, values in (("k", scales.k), ("v", scales.v)):
            scale = getattr(pages, f"{name}_scale")
            if len(values) != len(scale) or not all(0 < value < float("inf") for value in values):
                raise BadInputError(
                    f"fp8_scales of layer {index}: {name} is {values}",
                    f"give {len(scale)} positive numbers, one a KV head",
                )
            scale.copy_(torch.tensor(values))


def _layer_pools(
    place: LayerPlace,
    num_pages: Mapping[str, int],
    config: KVCacheConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerPools:
    def pool(kind: Kind, group: str) -> Pool:
        return new_pool(kind, num_pages[group], config.page_size, place.layer, dtype, device)

    if place.recent is not None:
        return LayerPools(place, pool("int4", place.group), pool("16-bit", place.recent))
    kind: Kind = "16-bit"
    if config.kind == "fp8" or config.kind == "int8":
        kind = config.kind
    return LayerPools(place, pool(kind, place.group))


def new_pool(
    kind: Kind,
    num_pages: int,
    page_size: int,
    layer: AttentionLayer,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Pool:
    """An empty pool; fp8 scales are 1. Arguments as of ``llmopt_kernels.paged_kv.new_cache``."""
    heads, head_dim = layer.num_kv_heads, layer.head_dim
    if kind == "int4" and head_dim % 2:
        raise BadInputError(
            f"heads of {head_dim} channels cannot be int4: two channels share a byte",
            "choose kv_cache int8 or fp8",
        )
    channels = head_dim // 2 if kind == "int4" else head_dim
    element = {
        "16-bit": dtype,
        "fp8": torch.float8_e4m3fn,
        "int8": torch.int8,
        "int4": torch.uint8,
    }[kind]

    def codes() -> Tensor:
        memory = torch.zeros(heads, num_pages, page_size, channels, dtype=element, device=device)
        return memory.permute(1, 2, 0, 3)

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    by_token, by_channel = (num_pages, page_size, heads), (num_pages, heads, head_dim)
    if kind == "16-bit":
        pages = PagedKV(codes(), codes())
    elif kind == "fp8":
        pages = PagedKV(codes(), codes(), numbers(heads) + 1, numbers(heads) + 1)
    elif kind == "int8":
        pages = PagedKV(codes(), codes(), numbers(*by_token), numbers(*by_token))
    else:
        keys, values = numbers(*by_channel), numbers(*by_token)
        pages = PagedKV(codes(), codes(), keys, values, keys.clone(), values.clone())
    return Pool(kind, pages)


def _copy_page(pages: PagedKV, copy: PageCopy) -> None:
    for part in pages.tensors().values():
        if part is not None and part.dim() > 1:  # fp8's scales belong to no page
            part[copy.target] = part[copy.source]
