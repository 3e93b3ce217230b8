"""A paged KV cache: its layouts, its element types, and what its codes mean.

Keys and values of a sequence lie in pages of a pool; the sequence's row of the block table says in
which, in order. Four kinds:

- ``16-bit``: bfloat16 or float16 elements.
- ``fp8``: float8_e4m3fn elements; ``value = code * scale[head]``.
- ``int8``: ``value = code * scale[page, token, head]``, symmetric.
- ``int4``: KIVI (arXiv:2402.02750): ``value = code * scale + minimum``, unsigned codes 0..15; of a
  key by channel, shared by the tokens of its page; of a value by token, shared by its channels.
  Two channels share a byte, channel ``j`` in the low nibble and ``j + head_dim / 2`` in the high
  one, so that a kernel needs no shuffle: it works on the two halves apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmopt_kernels.launching import check_choice, check_last_contiguous, check_shape

Kind = Literal["16-bit", "fp8", "int8", "int4"]
PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

_KINDS: dict[torch.dtype, Kind] = {
    torch.bfloat16: "16-bit",
    torch.float16: "16-bit",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
    torch.uint8: "int4",
}


@dataclass(frozen=True, slots=True)
class PagedKV:
    """The pool of one layer.

    Attributes:
        k: ``(num_pages, page_size, kv_heads, head_dim)``, of int4 ``head_dim / 2`` bytes. Any
            strides but the last: vLLM's ``(blocks, kv_heads, block_size, 2 * head_dim)`` is two
            views of one tensor (``from_interleaved``).
        v: likewise; the strides may differ.
        k_scale: float32. fp8 ``(kv_heads,)``, int8 ``(num_pages, page_size, kv_heads)``, int4
            ``(num_pages, kv_heads, head_dim)``; none for 16 bit.
        v_scale: float32. fp8 ``(kv_heads,)``, int8 and int4 ``(num_pages, page_size, kv_heads)``.
        k_min: of int4, shape of ``k_scale``.
        v_min: of int4, shape of ``v_scale``.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_min: Tensor | None = None
    v_min: Tensor | None = None

    @property
    def kind(self) -> Kind:
        """Which of the four kinds, by the element type."""
        return _KINDS[self.k.dtype]

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return int(self.k.shape[0])

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return int(self.k.shape[1])

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return int(self.k.shape[2])

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return int(self.k.shape[3]) * (2 if self.kind == "int4" else 1)

    def tensors(self) -> dict[str, Tensor | None]:
        """All parts by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def from_interleaved(cache: Tensor) -> PagedKV:
    """View vLLM's 16-bit layout ``(blocks, kv_heads, block_size, 2 * head_dim)``."""
    by_token = cache.transpose(1, 2)
    head_dim = cache.shape[-1] // 2
    return PagedKV(by_token[..., :head_dim], by_token[..., head_dim:])


def new_cache(
    kind: Kind,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> PagedKV:
    """An empty pool; ``dtype`` is that of a 16-bit one. fp8 scales are 1 until they are set."""
    pool = (num_pages, page_size, num_kv_heads)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if kind == "16-bit":
        return PagedKV(zeros(*pool, head_dim, dtype=dtype), zeros(*pool, head_dim, dtype=dtype))
    if kind == "fp8":
        fp8 = torch.float8_e4m3fn
        ones = torch.ones(num_kv_heads, dtype=torch.float32, device=device)
        codes = zeros(*pool, head_dim, dtype=fp8), zeros(*pool, head_dim, dtype=fp8)
        return PagedKV(*codes, ones, ones.clone())
    if kind == "int8":
        codes = (zeros(*pool, head_dim, dtype=torch.int8), zeros(*pool, head_dim, dtype=torch.int8))
        return PagedKV(*codes, zeros(*pool), zeros(*pool))
    by_channel = (num_pages, num_kv_heads, head_dim)
    return PagedKV(
        zeros(*pool, head_dim // 2, dtype=torch.uint8),
        zeros(*pool, head_dim // 2, dtype=torch.uint8),
        zeros(*by_channel),
        zeros(*pool),
        zeros(*by_channel),
        zeros(*pool),
    )


def check_cache(cache: PagedKV) -> None:
    """Hold that the parts of a cache fit together.

    Raises:
        ValueError: element type, page size, head dimension, shape or stride that does not fit;
            says what it got.
    """
    if cache.k.dtype not in _KINDS or cache.v.dtype != cache.k.dtype:
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KINDS)
        raise ValueError(
            f"the cache's k is {cache.k.dtype} and its v {cache.v.dtype}; use one of {types}"
        )
    check_shape("k", cache.k, (None, None, None, None))
    check_shape("v", cache.v, cache.k.shape)
    check_choice("page size", cache.page_size, PAGE_SIZES)
    check_choice("head dimension", cache.head_dim, HEAD_DIMS)
    for name in ("k", "v"):
        check_last_contiguous(name, getattr(cache, name))
    for name, shape in _scale_shapes(cache).items():
        part = getattr(cache, name)
        if (part is None) != (shape is None):
            state = "lacks" if part is None else "has"
            raise ValueError(f"a cache of kind {cache.kind} {state} {name}")
        if part is not None and shape is not None:
            check_shape(name, part, shape)
            if part.dtype != torch.float32 or not part.is_contiguous():
                raise ValueError(f"{name} is {part.dtype}; it must be contiguous float32")


def check_block_table(table: Tensor, num_tokens: Tensor, cache: PagedKV) -> None:
    """Hold that every page that a sequence reads is in the pool. Reads values: for debugging.

    Args:
        table: ``(sequences, pages) int32``.
        num_tokens: ``(sequences,) int32`` in the cache.
        cache: the pool.

    Raises:
        ValueError: too few pages in a row, or a page out of range; says where.
    """
    pages = -(-num_tokens // cache.page_size)
    if bool((pages > table.shape[1]).any()):
        row = int((pages - table.shape[1]).argmax())
        raise ValueError(
            f"sequence {row} has {int(num_tokens[row])} tokens, its row of the block table "
            f"{table.shape[1]} pages of {cache.page_size}"
        )
    read = torch.arange(table.shape[1], device=table.device) < pages[:, None]
    wrong = read & ((table < 0) | (table >= cache.num_pages))
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"block table [{row}, {column}] is {int(table[row, column])}; the pool has "
            f"{cache.num_pages} pages"
        )


def dequantize_pages(cache: PagedKV, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of pages ``(n,)``: twice ``(n, page_size, kv_heads, head_dim)``.

    The definition of what a cache means; every kernel is tested against it.
    """
    pages = pages.long()
    k, v = cache.k[pages], cache.v[pages]
    if cache.kind == "16-bit":
        return k.to(dtype), v.to(dtype)
    assert cache.k_scale is not None and cache.v_scale is not None
    if cache.kind == "fp8":
        return (
            k.to(dtype) * cache.k_scale.to(dtype)[:, None],
            v.to(dtype) * cache.v_scale.to(dtype)[:, None],
        )
    by_token = cache.v_scale[pages].to(dtype)[..., None]
    if cache.kind == "int8":
        return k.to(dtype) * cache.k_scale[pages].to(dtype)[..., None], v.to(dtype) * by_token
    assert cache.k_min is not None and cache.v_min is not None
    k_scale, k_min = cache.k_scale[pages].to(dtype), cache.k_min[pages].to(dtype)
    v_min = cache.v_min[pages].to(dtype)[..., None]
    keys = unpack_nibbles(k).to(dtype) * k_scale[:, None] + k_min[:, None]
    return keys, unpack_nibbles(v).to(dtype) * by_token + v_min


def gather(
    cache: PagedKV, table: Tensor, num_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, dequantized: twice ``(num_tokens, kv_heads, head_dim)``."""
    num_pages = -(-num_tokens // cache.page_size)
    k, v = dequantize_pages(cache, table[:num_pages], dtype)
    return k.flatten(0, 1)[:num_tokens], v.flatten(0, 1)[:num_tokens]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 ``(..., head_dim)`` to ``(..., head_dim / 2) uint8``, low nibbles first half."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_nibbles``."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _scale_shapes(cache: PagedKV) -> dict[str, tuple[int, ...] | None]:
    pool = tuple(cache.k.shape[:3])
    by_channel = (cache.num_pages, cache.num_kv_heads, cache.head_dim)
    heads = (cache.num_kv_heads,)
    shapes: dict[Kind, tuple[tuple[int, ...] | None, ...]] = {
        "16-bit": (None, None, None, None),
        "fp8": (heads, heads, None, None),
        "int8": (pool, pool, None, None),
        "int4": (by_channel, pool, by_channel, pool),
    }
    return dict(zip(("k_scale", "v_scale", "k_min", "v_min"), shapes[cache.kind], strict=True))
