"""Quantize full pages of a 16-bit KV cache to int4 (KIVI, arXiv:2402.02750).

Of every page and KV head, with the minimum and maximum of a key's channel over the tokens of the
page, and of a value's token over its channels::

    scale = (maximum - minimum) / 15
    code  = round((x - minimum) / scale)     0..15, halves to even; 0 where scale is 0

so that ``code * scale + minimum`` is within half a scale of ``x``, and a constant channel or token
comes back exactly. Keys need every token of the page: only full pages are quantized, and the page
in which a sequence ends stays in 16 bit. Channels ``j`` and ``j + head_dim / 2`` share a byte
(``paged_kv.py``). A channel or token that holds a NaN or an infinity comes back as NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_kernels.launching import (
    check_dtype,
    check_launchable,
    check_shape,
    launch,
    runs_kernel,
)
from llmopt_kernels.paged_kv import PagedKV, check_cache, dequantize_pages, pack_nibbles
from llmopt_kernels.rounding import round_half_even
from llmopt_kernels.triton_or_stub import tl, triton

LEVELS = 15
KEY_BYTES_PER_PROGRAM = 32
VALUE_TOKENS_PER_PROGRAM = 16
"""Divides every page size."""


def kv_page_quantize(
    source: PagedKV,
    source_pages: Tensor,
    cache: PagedKV,
    pages: Tensor,
    *,
    check_values: bool = False,
) -> None:
    """Write ``source``'s pages into ``cache`` as int4, in place.

    Args:
        source: 16-bit pool; page size, KV heads and head dimension as of ``cache``.
        source_pages: ``(n,)`` int32 or int64, full pages of ``source``.
        cache: int4 pool.
        pages: ``(n,)`` of the same type, where they go; none twice. A pair with a negative page on
            either side is skipped, so that a captured launch can be padded.
        check_values: hold that pages are in their pools. Waits for the device; for debugging.

    Raises:
        ValueError: kind, shape, element type, device or value that does not fit.
    """
    _check(source, source_pages, cache, pages, check_values)
    if runs_kernel(cache.k):
        launch_kv_page_quantize(source, source_pages, cache, pages)
    else:
        kv_page_quantize_reference(source, source_pages, cache, pages, dtype=torch.float32)


def kv_page_quantize_reference(
    source: PagedKV,
    source_pages: Tensor,
    cache: PagedKV,
    pages: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """As ``kv_page_quantize``, computed in ``dtype``: ``cache`` changes in place."""
    kept = (source_pages >= 0) & (pages >= 0)
    k, v = dequantize_pages(source, source_pages[kept], dtype)
    quantize_pages_reference(k, v, cache, pages[kept].long())


def quantize_pages_reference(k: Tensor, v: Tensor, cache: PagedKV, pages: Tensor) -> None:
    """Write keys and values of any element type into ``cache``'s pages, computed in their own.

    Args:
        k: ``(n, page_size, kv_heads, head_dim)``, full pages.
        v: likewise.
        cache: int4 pool; changes in place.
        pages: ``(n,) int64``, where they go.
    """
    assert cache.k_scale is not None and cache.v_scale is not None
    assert cache.k_min is not None and cache.v_min is not None
    parts = (
        (k, 1, cache.k, cache.k_scale, cache.k_min),
        (v, 3, cache.v, cache.v_scale, cache.v_min),
    )
    for x, shared, codes, scales, minima in parts:
        minimum, maximum = x.amin(shared, keepdim=True), x.amax(shared, keepdim=True)
        scale = (maximum - minimum) / LEVELS
        # A NaN has no code; its scale is NaN, and so is what comes back.
        code = torch.where(scale == 0, 0.0, (x - minimum) / scale).nan_to_num(0.0)
        codes[pages] = pack_nibbles(code.round().clamp(0, LEVELS))
        scales[pages] = scale.squeeze(shared).float()
        minima[pages] = minimum.squeeze(shared).float()


@triton.jit
def _bounds(x, mask, AXIS: tl.constexpr):
    """Minimum and maximum along an axis; both NaN where there is a NaN or an infinity."""
    strange = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), AXIS)
    low = tl.min(tl.where(mask, x, float("inf")), AXIS)
    high = tl.max(tl.where(mask, x, float("-inf")), AXIS)
    nan = float("nan")
    return tl.where(strange == 0, low, nan), tl.where(strange == 0, high, nan)


@triton.jit
def _codes(x, minimum, scale):
    scaled = (x - minimum) / tl.where(scale == 0.0, 1.0, scale)
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    return tl.minimum(tl.maximum(round_half_even(scaled), 0.0), 15.0).to(tl.uint8)


@triton.jit
def _quantize_keys(
    x_ptr,
    codes_ptr,
    scale_ptr,
    min_ptr,
    block,
    stride_token,
    stride_codes_token,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """All tokens of a page and head, a few channels of either half; pointers are the head's."""
    tokens = tl.arange(0, PAGE_SIZE)[:, None].to(tl.int64)
    j = block * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    inside = j < HALF
    # Channels beyond HALF load as zeros and meet no other channel.
    first = tl.load(x_ptr + tokens * stride_token + j[None, :], mask=inside[None, :], other=0.0)
    second = tl.load(
        x_ptr + tokens * stride_token + HALF + j[None, :], mask=inside[None, :], other=0.0
    )
    first, second = first.to(tl.float32), second.to(tl.float32)
    first_min, first_max = _bounds(first, True, 0)
    second_min, second_max = _bounds(second, True, 0)
    first_scale, second_scale = (first_max - first_min) / 15.0, (second_max - second_min) / 15.0
    tl.store(min_ptr + j, first_min, mask=inside)
    tl.store(min_ptr + HALF + j, second_min, mask=inside)
    tl.store(scale_ptr + j, first_scale, mask=inside)
    tl.store(scale_ptr + HALF + j, second_scale, mask=inside)
    low = _codes(first, first_min[None, :], first_scale[None, :])
    high = _codes(second, second_min[None, :], second_scale[None, :])
    codes_ptrs = codes_ptr + tokens * stride_codes_token + j[None, :]
    tl.store(codes_ptrs, low | (high << 4), mask=inside[None, :])


@triton.jit
def _quantize_values(
    x_ptr,
    codes_ptr,
    scale_ptr,
    min_ptr,
    block,
    stride_token,
    stride_codes_token,
    stride_scale_token,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """A few tokens of a page and head, all channels; pointers are the head's."""
    tokens = (block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    j = tl.arange(0, BLOCK_HALF)[None, :]
    x_ptrs = x_ptr + tokens[:, None] * stride_token + j
    first = tl.load(x_ptrs, mask=j < HALF, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF, mask=j < HALF, other=0.0).to(tl.float32)
    first_min, first_max = _bounds(first, j < HALF, 1)
    second_min, second_max = _bounds(second, j < HALF, 1)
    minimum = tl.minimum(first_min, second_min, propagate_nan=tl.PropagateNan.ALL)
    maximum = tl.maximum(first_max, second_max, propagate_nan=tl.PropagateNan.ALL)
    scale = (maximum - minimum) / 15.0
    tl.store(min_ptr + tokens * stride_scale_token, minimum)
    tl.store(scale_ptr + tokens * stride_scale_token, scale)
    low = _codes(first, minimum[:, None], scale[:, None])
    high = _codes(second, minimum[:, None], scale[:, None])
    codes_ptrs = codes_ptr + tokens[:, None] * stride_codes_token + j
    tl.store(codes_ptrs, low | (high << 4), mask=j < HALF)


@triton.jit
def _kv_page_quantize_kernel(
    k_ptr,
    v_ptr,
    source_pages_ptr,
    pages_ptr,
    k_codes_ptr,
    v_codes_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_min_ptr,
    v_min_ptr,
    num_kv_heads,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    stride_k_codes_page,
    stride_k_codes_token,
    stride_k_codes_head,
    stride_v_codes_page,
    stride_v_codes_token,
    stride_v_codes_head,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_KEY_BYTES: tl.constexpr,
    BLOCK_VALUE_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    # Programs of a page and head: of its keys, a few channels each; of its values, a few tokens.
    source_page = tl.load(source_pages_ptr + tl.program_id(0)).to(tl.int64)
    page = tl.load(pages_ptr + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    key_programs: tl.constexpr = (HALF + BLOCK_KEY_BYTES - 1) // BLOCK_KEY_BYTES
    if (source_page >= 0) & (page >= 0):
        if block < key_programs:
            channels = (page * num_kv_heads + head) * 2 * HALF
            _quantize_keys(
                k_ptr + source_page * stride_k_page + head * stride_k_head,
                k_codes_ptr + page * stride_k_codes_page + head * stride_k_codes_head,
                k_scale_ptr + channels,
                k_min_ptr + channels,
                block,
                stride_k_token,
                stride_k_codes_token,
                PAGE_SIZE,
                HALF,
                BLOCK_KEY_BYTES,
            )
        else:
            tokens = page * PAGE_SIZE * num_kv_heads + head
            _quantize_values(
                v_ptr + source_page * stride_v_page + head * stride_v_head,
                v_codes_ptr + page * stride_v_codes_page + head * stride_v_codes_head,
                v_scale_ptr + tokens,
                v_min_ptr + tokens,
                block - key_programs,
                stride_v_token,
                stride_v_codes_token,
                num_kv_heads,
                HALF,
                BLOCK_VALUE_TOKENS,
                BLOCK_HALF,
            )


def launch_kv_page_quantize(
    source: PagedKV,
    source_pages: Tensor,
    cache: PagedKV,
    pages: Tensor,
    *,
    check_values: bool = False,
) -> None:
    """As ``kv_page_quantize``, by the kernel.

    Raises:
        ValueError: kind, shape, element type, device or value that does not fit.
    """
    _check(source, source_pages, cache, pages, check_values)
    pool = {f"cache.{name}": part for name, part in cache.tensors().items()}
    check_launchable(
        source_k=source.k, source_v=source.v, source_pages=source_pages, pages=pages, **pool
    )
    if pages.numel() == 0:
        return
    half = cache.head_dim // 2
    key_programs = triton.cdiv(half, KEY_BYTES_PER_PROGRAM)
    value_programs = triton.cdiv(cache.page_size, VALUE_TOKENS_PER_PROGRAM)
    launch(
        _kv_page_quantize_kernel,
        (pages.numel(), cache.num_kv_heads, key_programs + value_programs),
        source.k,
        source.v,
        source_pages,
        pages,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        cache.k_min,
        cache.v_min,
        cache.num_kv_heads,
        *source.k.stride()[:3],
        *source.v.stride()[:3],
        *cache.k.stride()[:3],
        *cache.v.stride()[:3],
        PAGE_SIZE=cache.page_size,
        HALF=half,
        BLOCK_KEY_BYTES=KEY_BYTES_PER_PROGRAM,
        BLOCK_VALUE_TOKENS=VALUE_TOKENS_PER_PROGRAM,
        BLOCK_HALF=triton.next_power_of_2(half),
        # A thread holds at most 32 keys, however long the page.
        num_warps=8 if cache.page_size > 32 else 4,
    )


def _check(
    source: PagedKV, source_pages: Tensor, cache: PagedKV, pages: Tensor, check_values: bool
) -> None:
    check_cache(source)
    check_cache(cache)
    if source.kind != "16-bit" or cache.kind != "int4":
        raise ValueError(
            f"the source is {source.kind} and the cache {cache.kind}; pages go from a 16-bit "
            "cache to an int4 one"
        )
    for name in ("page_size", "num_kv_heads", "head_dim"):
        if getattr(source, name) != getattr(cache, name):
            raise ValueError(
                f"{name} is {getattr(source, name)} of the source and {getattr(cache, name)} of "
                "the cache"
            )
    check_shape("source_pages", source_pages, (None,))
    check_shape("pages", pages, source_pages.shape)
    check_dtype("source_pages", source_pages, (torch.int32, torch.int64))
    check_dtype("pages", pages, (source_pages.dtype,))
    for name, vector in (("source_pages", source_pages), ("pages", pages)):
        if not vector.is_contiguous():
            raise ValueError(f"{name} has strides {vector.stride()}; it must be contiguous")
    if check_values:
        _check_values("source_pages", source_pages, source)
        _check_values("pages", pages, cache)
        kept = pages[(pages >= 0) & (source_pages >= 0)]
        if kept.unique().numel() != kept.numel():
            raise ValueError(f"a page is written twice: {pages.tolist()}")


def _check_values(name: str, pages: Tensor, pool: PagedKV) -> None:
    wrong = pages >= pool.num_pages
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{row}] is {int(pages[row])}; the pool has {pool.num_pages} pages")
