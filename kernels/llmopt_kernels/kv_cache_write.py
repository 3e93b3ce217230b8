"""Write new keys and values into a paged cache: rotate, quantize and scatter in one launch.

For token ``t`` and KV head ``h``, with ``slots[t] = page * page_size + offset``::

    cache.k[page, offset, h] = encode(rope(k[t, h], positions[t]))
    cache.v[page, offset, h] = encode(v[t, h])
    q[t, :]                  = rope(q[t, :], positions[t])               (optional, in place)

The rotation is RoFormer's (arXiv:2104.09864), as in ``rope.py``; without tables there is none.
``encode`` goes by the cache's kind (``paged_kv.py``): 16 bit rounds; fp8 divides by the cache's
scale of the head and saturates; int8 computes the scale of the token and head, ``max(|x|) / 127``,
and writes it beside the codes. What is quantized is the rotated float32 value, not first rounded
to 16 bit: it is nearer to the key than what a 16-bit cache would hold.

int4 codes need all tokens of a page: write a 16-bit cache, then ``kv_page_quantize`` full pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.launching import (
    check_dtype,
    check_last_contiguous,
    check_launchable,
    check_shape,
    check_writable,
    launch,
    runs_kernel,
)
from llmopt_kernels.paged_kv import PagedKV, check_cache
from llmopt_kernels.quantize_rows import largest_magnitude
from llmopt_kernels.rope import check_positions, check_rotation, rope_reference
from llmopt_kernels.rounding import quantize, row_scale, row_scale_from
from llmopt_kernels.row_output import HALF_DTYPES, encode, larger
from llmopt_kernels.triton_or_stub import tl, triton

HEADS_PER_PROGRAM = 8


@dataclass(frozen=True, slots=True)
class WriteProblem:
    """What kv_cache_write writes and where; see there for the attributes."""

    k: Tensor
    v: Tensor
    slots: Tensor
    cache: PagedKV
    q: Tensor | None = None
    positions: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    def tensors(self) -> dict[str, Tensor | None]:
        """All parts by name."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "cache"}
        return own | {f"cache.{name}": part for name, part in self.cache.tensors().items()}


def kv_cache_write(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    cache: PagedKV,
    *,
    q: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    check_values: bool = False,
) -> None:
    """Write ``k`` and ``v`` into ``cache`` and rotate ``q``, in place.

    Args:
        k: ``(tokens, kv_heads, head_dim)`` bfloat16 or float16, before its rotation.
        v: likewise, of the same type.
        slots: ``(tokens,)`` int64 or int32, ``page * page_size + offset``; a negative one skips
            the token's key and value (its query is rotated all the same). None twice.
        cache: 16-bit (of ``k``'s type), fp8 or int8.
        q: ``(tokens, heads, head_dim)`` of ``k``'s type; needs the tables.
        positions: ``(tokens,)`` int32 or int64, rows of the tables; given with them.
        cos: ``(positions, rotary_dim / 2)`` float32, or ``None`` for no rotation.
        sin: likewise.
        check_values: hold that slots are in the pool and positions in the tables. Waits for the
            device; for debugging.

    Raises:
        ValueError: an int4 cache; shape, element type, stride, device or value that does not fit.
    """
    problem = WriteProblem(k, v, slots, cache, q, positions, cos, sin)
    check_problem(problem, check_values)
    if runs_kernel(k):
        launch_kv_cache_write(problem)
    else:
        kv_cache_write_reference(problem, torch.float32)


def kv_cache_write_reference(problem: WriteProblem, dtype: torch.dtype = torch.float64) -> None:
    """As ``kv_cache_write``, computed in ``dtype``: the cache and ``q`` change in place."""
    p, cache = problem, problem.cache
    k, v = p.k.to(dtype), p.v.to(dtype)
    if p.cos is not None and p.sin is not None and p.positions is not None:
        k = rope_reference(k, p.positions, p.cos, p.sin, dtype)
        if p.q is not None:
            p.q.copy_(rope_reference(p.q, p.positions, p.cos, p.sin, dtype))
    written = p.slots >= 0
    page = p.slots[written] // cache.page_size
    offset = p.slots[written] % cache.page_size
    parts = (k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)
    for x, pages, scale in parts:
        x = x[written]
        if scale is None:
            pages[page, offset] = x.to(pages.dtype)
        elif cache.kind == "fp8":
            pages[page, offset] = quantize(x, scale.to(dtype)[:, None], pages.dtype)
        else:
            found = row_scale(x, pages.dtype)
            pages[page, offset] = quantize(x, found, pages.dtype)
            scale[page, offset] = found[..., 0].float()


@triton.jit
def _rotated(x_ptrs, cos, sin, mask, HALF: tl.constexpr):
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _write_heads(
    x_ptrs,
    pages_ptrs,
    scale_ptrs,
    mask,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate the first 2 * HALF channels of heads, encode all, store; pointers are ``(heads,)``."""
    ELEMENT: tl.constexpr = pages_ptrs.dtype.element_ty
    scale = tl.full(mask.shape, 1.0, tl.float32)
    if KIND == "fp8":
        scale = tl.load(scale_ptrs, mask=mask, other=1.0)
    largest = tl.zeros(mask.shape, tl.float32)
    if HALF > 0:
        j = tl.arange(0, BLOCK_HALF)[None, :]
        pair_mask = mask[:, None] & (j < HALF)
        first, second = _rotated(x_ptrs[:, None] + j, cos, sin, pair_mask, HALF)
        largest = larger(largest_magnitude(first, 1), largest_magnitude(second, 1))
    if HEAD_DIM > 2 * HALF:
        rest_j = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest_mask = mask[:, None] & (rest_j < HEAD_DIM)
        rest = tl.load(x_ptrs[:, None] + rest_j, mask=rest_mask, other=0.0).to(tl.float32)
        largest = larger(largest, largest_magnitude(rest, 1))
    if KIND == "int8":
        scale = row_scale_from(largest, 127.0)
        tl.store(scale_ptrs, scale, mask=mask)
    if HALF > 0:
        first_ptrs = pages_ptrs[:, None] + j
        tl.store(first_ptrs, encode(first, scale[:, None], ELEMENT), mask=pair_mask)
        tl.store(first_ptrs + HALF, encode(second, scale[:, None], ELEMENT), mask=pair_mask)
    if HEAD_DIM > 2 * HALF:
        rest = encode(rest, scale[:, None], ELEMENT)
        tl.store(pages_ptrs[:, None] + rest_j, rest, mask=rest_mask)


@triton.jit
def _kv_cache_write_kernel(
    k_ptr,
    v_ptr,
    q_ptr,
    slots_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_kv_heads,
    num_heads,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_offset,
    stride_k_page_head,
    stride_v_page,
    stride_v_offset,
    stride_v_page_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # Programs of a token: first those of its keys, then of its values, then of its queries.
    token = tl.program_id(0).to(tl.int64)
    kv_programs = tl.cdiv(num_kv_heads, BLOCK_HEADS)
    block = tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    written_heads = tl.where(slot >= 0, num_kv_heads, 0)
    cos, sin = 1.0, 0.0
    if HALF > 0:
        position = tl.load(positions_ptr + token).to(tl.int64)
        j = tl.arange(0, BLOCK_HALF)[None, :]
        cos = tl.load(cos_ptr + position * HALF + j, mask=j < HALF, other=0.0)
        sin = tl.load(sin_ptr + position * HALF + j, mask=j < HALF, other=0.0)
    if block < kv_programs:
        heads = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        _write_heads(
            k_ptr + token * stride_k_token + heads * stride_k_head,
            k_pages_ptr + page * stride_k_page + offset * stride_k_offset
            + heads * stride_k_page_head,
            _scale_ptrs(k_scale_ptr, slot, heads, num_kv_heads, KIND),
            heads < written_heads,
            cos,
            sin,
            HEAD_DIM,
            HALF,
            KIND,
            BLOCK_HALF,
            BLOCK_REST,
        )  # fmt: skip
    elif block < 2 * kv_programs:
        heads = ((block - kv_programs) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        _write_heads(
            v_ptr + token * stride_v_token + heads * stride_v_head,
            v_pages_ptr + page * stride_v_page + offset * stride_v_offset
            + heads * stride_v_page_head,
            _scale_ptrs(v_scale_ptr, slot, heads, num_kv_heads, KIND),
            heads < written_heads,
            cos,
            sin,
            HEAD_DIM,
            0,
            KIND,
            BLOCK_HALF,
            BLOCK_DIM,
        )  # fmt: skip
    elif q_ptr is not None:
        heads = ((block - 2 * kv_programs) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        j = tl.arange(0, BLOCK_HALF)[None, :]
        mask = (heads < num_heads)[:, None] & (j < HALF)
        q_ptrs = q_ptr + token * stride_q_token + heads[:, None] * stride_q_head + j
        first, second = _rotated(q_ptrs, cos, sin, mask, HALF)
        tl.store(q_ptrs, first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_ptrs + HALF, second.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_ptrs(scale_ptr, slot, heads, num_kv_heads, KIND: tl.constexpr):
    if KIND == "fp8":
        return scale_ptr + heads
    elif KIND == "int8":
        return scale_ptr + slot * num_kv_heads + heads
    else:
        return heads


def launch_kv_cache_write(problem: WriteProblem) -> None:
    """As ``kv_cache_write``, by the kernel.

    Raises:
        ValueError: an int4 cache; shape, element type, stride or device that does not fit.
    """
    p, cache = problem, problem.cache
    check_problem(p)
    check_launchable(**p.tensors())
    num_tokens, num_kv_heads, head_dim = p.k.shape
    if num_tokens == 0:
        return
    num_heads = 0 if p.q is None else p.q.shape[1]
    half = 0 if p.cos is None else p.cos.shape[1]
    block = min(HEADS_PER_PROGRAM, triton.next_power_of_2(max(num_kv_heads, num_heads)))
    block_dim = triton.next_power_of_2(head_dim)
    programs = 2 * triton.cdiv(num_kv_heads, block) + triton.cdiv(num_heads, block)
    launch(
        _kv_cache_write_kernel,
        (num_tokens, programs),
        p.k,
        p.v,
        p.q,
        p.slots,
        p.positions,
        p.cos,
        p.sin,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        num_kv_heads,
        num_heads,
        *p.k.stride()[:2],
        *p.v.stride()[:2],
        *((0, 0) if p.q is None else p.q.stride()[:2]),
        *cache.k.stride()[:3],
        *cache.v.stride()[:3],
        PAGE_SIZE=cache.page_size,
        HEAD_DIM=head_dim,
        HALF=half,
        KIND=cache.kind,
        BLOCK_HEADS=block,
        BLOCK_HALF=triton.next_power_of_2(max(half, 1)),
        BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
        BLOCK_DIM=block_dim,
        # 8 elements a thread: one load of 16 bytes.
        num_warps=min(4, max(1, block * block_dim // 256)),
    )


def check_problem(problem: WriteProblem, check_values: bool = False) -> None:
    """Hold that a problem fits together; ``check_values`` waits for the device.

    Raises:
        ValueError: an int4 cache; shape, element type, stride or value that does not fit.
    """
    p, cache = problem, problem.cache
    check_cache(cache)
    if cache.kind == "int4":
        raise ValueError(
            "the cache is int4, whose codes need all tokens of a page: write a 16-bit cache and "
            "call kv_page_quantize on its full pages"
        )
    check_shape("k", p.k, (None, cache.num_kv_heads, cache.head_dim))
    check_dtype("k", p.k, HALF_DTYPES)
    if cache.kind == "16-bit":
        check_dtype("k", p.k, (cache.k.dtype,))
    check_shape("v", p.v, p.k.shape)
    check_dtype("v", p.v, (p.k.dtype,))
    check_shape("slots", p.slots, (p.k.shape[0],))
    check_dtype("slots", p.slots, (torch.int64, torch.int32))
    if not p.slots.is_contiguous():
        raise ValueError(f"slots has strides {p.slots.stride()}; it must be contiguous")
    if p.q is not None:
        check_shape("q", p.q, (p.k.shape[0], None, p.k.shape[2]))
        check_dtype("q", p.q, (p.k.dtype,))
        check_writable("q", p.q)
    for name, x in (("k", p.k), ("v", p.v), ("q", p.q)):
        if x is not None:
            check_last_contiguous(name, x)
    _check_tables(p)
    if check_values:
        _check_values(p)


def _check_tables(problem: WriteProblem) -> None:
    p = problem
    tables = {"positions": p.positions, "cos": p.cos, "sin": p.sin}
    missing = [name for name, table in tables.items() if table is None]
    if len(missing) == 3 and p.q is None:
        return
    if p.positions is None or p.cos is None or p.sin is None:
        given = [name for name, part in {"q": p.q, **tables}.items() if part is not None]
        raise ValueError(
            f"{', '.join(given)} given without {', '.join(missing)}; a rotation takes positions, "
            "cos and sin, and q is there to be rotated"
        )
    check_rotation(p.positions, p.cos, p.sin, p.k.shape[0])
    if not 0 < 2 * p.cos.shape[1] <= p.k.shape[2]:
        raise ValueError(f"tables rotate {2 * p.cos.shape[1]} channels, k has {p.k.shape[2]}")


def _check_values(problem: WriteProblem) -> None:
    p = problem
    num_slots = p.cache.num_pages * p.cache.page_size
    wrong = p.slots >= num_slots
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"slots[{row}] is {int(p.slots[row])}; the pool has {num_slots} slots")
    kept = p.slots[p.slots >= 0]
    if kept.unique().numel() != kept.numel():
        raise ValueError(f"two tokens share a slot: {p.slots.tolist()}")
    if p.positions is not None and p.cos is not None:
        check_positions(p.positions, p.cos.shape[0])
