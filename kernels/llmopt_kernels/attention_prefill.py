"""Attention of many query tokens over packed sequences (FlashAttention-2, arXiv:2307.08691).

Query ``i`` of a sequence stands at position ``p = i + kv_length - q_length``, so that the last
query sees the last key; with fewer queries than keys this is a chunk of a prompt. Over the keys
``j`` that it sees (causal: ``j <= p``; window: ``j > p - window`` too)::

    s_j = scale * q_i k_j,   with a soft cap (Gemma 2, arXiv:2408.00118)  cap * tanh(s_j / cap)
    lse = ln(sum_j e**s_j + e**sink)      sink: a logit of the head without a value (gpt-oss)
    out_i = sum_j e**(s_j - lse) v_j      0 where there is nothing to see

Keys and values are packed as the queries are, or lie in the pages of a ``PagedKV``, whose codes
become 16 bit in registers (``paged_kv_tile``). One pass over
tiles of keys keeps the running maximum and sum of the softmax; the probabilities are rounded to
the queries' 16 bits for the second product, all else is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.decode_problem import CachedTokens
from llmopt_kernels.launching import architecture, check_launchable, launch, runs_kernel
from llmopt_kernels.paged_kv import Kind, PagedKV, gather
from llmopt_kernels.paged_kv_tile import (
    find_pages,
    head_scale,
    load_keys,
    load_values,
    token_scale,
)
from llmopt_kernels.prefill_problem import PackedTokens, PrefillProblem, check_problem
from llmopt_kernels.triton_or_stub import tl, triton

LOG2_E = math.log2(math.e)
SHARED_BYTES = 227 * 2**10
"""Of a program, at compute capability 9.0."""
MAX_SEQUENCES = 65535
"""The second dimension of a grid ends there."""
MAX_WINDOW = 2**30
"""A wider one is as good as this one, and a position less a window stays within int32."""
L2_BYTES = 32 * 2**20
"""Keys and values for the programs that run at one time: within the L2 of an A100 or H100."""


def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    check_values: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from packed queries to packed keys and values.

    Args:
        q: ``(total_q, q_heads, head_dim)`` bfloat16 or float16; head_dim 64, 80, 96, 128, 192, 256.
        k: ``(total_kv, kv_heads, head_dim)`` likewise; ``q_heads`` is a multiple of ``kv_heads``.
        v: likewise.
        cu_seqlens_q: ``(sequences + 1,) int32``, from 0 to ``total_q``: sequence ``b`` is rows
            ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``. Rows behind the last are not written.
        cu_seqlens_k: likewise of ``k`` and ``v``.
        max_seqlen_q: at least the queries of the longest sequence; may be more than ``total_q``.
        causal: a query sees no key behind its own position.
        window: keys that a query sees, its own included (``sliding_window`` of a Hugging Face
            config); with ``causal`` alone.
        softcap: bound of the scores.
        sinks: ``(q_heads,)`` float32 or 16 bit, a logit of each head that joins the denominator.
        scale: of the scores, before the cap; None is ``head_dim ** -0.5``.
        return_lse: give the log-sum-exp too.
        check_values: read ``cu_seqlens_*`` and hold that they fit; for debugging.

    Returns:
        ``(total_q, q_heads, head_dim)`` in the type of ``q``; with ``return_lse`` also ``(q_heads,
        total_q)`` float32, natural, sinks included, ``-inf`` where a query sees nothing.

    Raises:
        ValueError: shape, element type, stride, device or number that does not fit.
    """
    kv = PackedTokens(k, v, cu_seqlens_k)
    options = causal, window, softcap, sinks, scale
    problem = PrefillProblem(q, kv, cu_seqlens_q, max_seqlen_q, *options)
    return _run(problem, return_lse, check_values)


def attention_prefill_paged(
    q: Tensor,
    cache: PagedKV,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    max_seqlen_q: int,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    check_values: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from a chunk of each prompt to its cached tokens, the chunk's own included.

    Args:
        q: as of ``attention_prefill``.
        cache: the pool, of any kind; a 16-bit one has the element type of ``q``.
        block_table: ``(sequences, pages) int32``, the pages of each sequence in order.
        cu_seqlens_q: as of ``attention_prefill``.
        kv_lengths: ``(sequences,) int32`` tokens in the cache.
        max_seqlen_q: as of ``attention_prefill``, like all that follow but the last.
        causal: a query sees no key behind its own position.
        window: keys that a query sees.
        softcap: bound of the scores.
        sinks: ``(q_heads,)`` logits.
        scale: of the scores.
        return_lse: give the log-sum-exp too.
        check_values: read lengths and block table and hold that they fit; for debugging.

    Returns:
        As ``attention_prefill``.

    Raises:
        ValueError: shape, element type, stride, device or number that does not fit.
    """
    kv = CachedTokens(cache, block_table, kv_lengths)
    options = causal, window, softcap, sinks, scale
    problem = PrefillProblem(q, kv, cu_seqlens_q, max_seqlen_q, *options)
    return _run(problem, return_lse, check_values)


def _run(
    problem: PrefillProblem, return_lse: bool, check_values: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    check_problem(problem, check_values)
    lse: Tensor | None
    if runs_kernel(problem.q):
        out, lse = launch_attention_prefill(problem, return_lse)
    else:
        out, lse = attention_prefill_reference(problem, torch.float32)
        out = out.to(problem.q.dtype)
    return (out, lse) if return_lse and lse is not None else out


def attention_prefill_reference(
    problem: PrefillProblem, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in ``dtype``, one sequence after another."""
    q = problem.q.to(dtype)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=dtype, device=q.device)
    bounds = problem.cu_seqlens_q.tolist()
    for index in range(problem.num_sequences):
        rows = slice(bounds[index], bounds[index + 1])
        k, v = _keys_and_values(problem, index, dtype)
        out[rows], lse[:, rows] = _attend(problem, q[rows], k, v)
    return out, lse


def _keys_and_values(
    problem: PrefillProblem, index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    kv = problem.kv
    if isinstance(kv, CachedTokens):
        return gather(kv.cache, kv.block_table[index], int(kv.lengths[index]), dtype)
    columns = slice(*kv.cu_seqlens[index : index + 2].tolist())
    return kv.k[columns].to(dtype), kv.v[columns].to(dtype)


def _attend(problem: PrefillProblem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: ``(queries, heads, head_dim)`` and ``(heads, queries)``."""
    p, group = problem, q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * p.factor
    if p.softcap is not None:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    position = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    key = torch.arange(len(k), device=q.device)
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    if p.causal:
        hidden |= key > position
    if p.window is not None:
        hidden |= key <= position - p.window
    scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    if p.sinks is not None:
        lse = torch.logaddexp(lse, p.sinks.to(q.dtype)[:, None])
    probabilities = (scores - lse[..., None]).exp().masked_fill(hidden, 0.0)
    return torch.einsum("hqk,khd->qhd", probabilities, v), lse


@triton.jit
def _edge_tile(index, begin, whole_begin, whole_end):
    """The ``index``-th tile of those before ``whole_begin`` and from ``whole_end`` on."""
    left = whole_begin - begin
    return tl.where(index < left, begin + index, whole_end + index - left)


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_min_ptr,
    v_min_ptr,
    sinks_ptr,
    cu_seqlens_q_ptr,
    kv_lengths_ptr,  # of packed keys cu_seqlens_k
    table_ptr,
    out_ptr,
    lse_ptr,
    factor,  # scores times this are logarithms of base 2; with a cap, twice tanh's argument are
    cap,
    window,
    total_q,
    num_tiles,
    num_heads,
    num_kv_heads,
    heads_at_once,
    stride_table,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    SAME_STRIDES: tl.constexpr,
    KIND: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last tiles of a sequence see most keys: they come first, so that short ones fill the end.
    # Heads are neighbours, so that those of a group read their keys from L2 together.
    program = tl.program_id(0)
    sequence = tl.program_id(1)
    rest = program // heads_at_once
    head = program % heads_at_once + rest // num_tiles * heads_at_once
    start_m = (num_tiles - 1 - rest % num_tiles) * BLOCK_M
    kv_head = head // (num_heads // num_kv_heads)
    if SAME_STRIDES:  # then keys and values share the registers that hold the offsets
        stride_v_page = stride_k_page
        stride_v_token = stride_k_token
        stride_v_head = stride_k_head
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    q_start = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    q_len = (tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start).to(tl.int32)
    if start_m >= q_len:
        return
    kv_start = tl.zeros((), tl.int64)
    kv_len = tl.load(kv_lengths_ptr + sequence)
    table_row_ptr = table_ptr
    if PAGE == 0:
        kv_start += kv_len
        kv_len = tl.load(kv_lengths_ptr + sequence + 1) - kv_len
    else:
        table_row_ptr += sequence.to(tl.int64) * stride_table

    dtype = q_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    channel_0 = tl.arange(0, BLOCK_0)
    channel_1 = tl.arange(0, BLOCK_1)
    in_rows = (start_m + m < q_len)[:, None]
    mask_0 = in_rows & (channel_0 < WIDTH_0)[None, :]
    mask_1 = in_rows & (channel_1 < WIDTH_1)[None, :]
    q_ptrs = q_ptr + (q_start + start_m) * stride_q_token + head.to(tl.int64) * stride_q_head
    q_ptrs = q_ptrs + m.to(tl.int64)[:, None] * stride_q_token
    q_0 = tl.load(q_ptrs + channel_0[None, :], mask=mask_0, other=0.0)
    if WIDTH_1 > 0:
        q_1 = tl.load(q_ptrs + WIDTH_0 + channel_1[None, :], mask=mask_1, other=0.0)

    # Tiles of keys begin..end are seen by some query, whole_begin..whole_end by every one.
    diagonal = start_m + kv_len - q_len  # the first query's position
    first_key = 0  # pages before it may be gone from the block table
    whole_begin = 0
    end = kv_len
    whole_end = kv_len // BLOCK_N
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(diagonal + BLOCK_M, 0))
        whole_end = tl.minimum(whole_end, tl.maximum(diagonal + 1, 0) // BLOCK_N)
    if window is not None:
        first_key = tl.maximum(diagonal + 1 - window, 0)
        whole_begin = tl.cdiv(tl.maximum(diagonal + BLOCK_M - window, 0), BLOCK_N)
    begin = first_key // BLOCK_N
    end = tl.cdiv(end, BLOCK_N)
    whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
    whole_end = tl.minimum(tl.maximum(whole_end, whole_begin), end)

    factor *= head_scale(k_scale_ptr, kv_head, KIND)
    position = diagonal + m
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc_0 = tl.zeros((BLOCK_M, BLOCK_0), tl.float32)
    if WIDTH_1 > 0:
        acc_1 = tl.zeros((BLOCK_M, BLOCK_1), tl.float32)
    for EDGE in tl.static_range(2):  # first the tiles that need no mask
        first = whole_begin
        last = whole_end
        if EDGE:
            first = 0
            last = end - whole_end + whole_begin - begin
        tile = first
        if EDGE:
            tile = _edge_tile(0, begin, whole_begin, whole_end)
        page = tl.zeros((1,), tl.int32)
        if PAGE > 0:
            page = find_pages(table_row_ptr, tile * BLOCK_N, first_key, kv_len, BLOCK_N, PAGE)
        for index in tl.range(first, last):
            next_tile = index + 1
            if EDGE:
                next_tile = _edge_tile(index + 1, begin, whole_begin, whole_end)
            key = tile * BLOCK_N + n
            if PAGE == 0:
                k_tile_ptr = k_ptr + (kv_start + tile * BLOCK_N) * stride_k_token
                v_tile_ptr = v_ptr + (kv_start + tile * BLOCK_N) * stride_v_token
                slot = n
                next_page = page
            else:
                k_tile_ptr = k_ptr
                v_tile_ptr = v_ptr
                slot = key % PAGE
                start = next_tile * BLOCK_N
                next_page = find_pages(table_row_ptr, start, first_key, kv_len, BLOCK_N, PAGE)
            readable = tl.full((BLOCK_N,), 1, tl.int1)
            if EDGE:
                readable = key < kv_len
                if window is not None:
                    readable = readable & (key >= first_key)
            k_0 = load_keys(
                k_tile_ptr, k_scale_ptr, k_min_ptr, page, slot, readable, kv_head, num_kv_heads,
                stride_k_page, stride_k_token, 0,
                dtype, KIND, HEAD_DIM, 0, WIDTH_0, BLOCK_0,
            )  # fmt: skip
            scores = tl.dot(q_0, k_0)
            if WIDTH_1 > 0:
                k_1 = load_keys(
                    k_tile_ptr, k_scale_ptr, k_min_ptr, page, slot, readable, kv_head, num_kv_heads,
                    stride_k_page, stride_k_token, 0,
                    dtype, KIND, HEAD_DIM, WIDTH_0, WIDTH_1, BLOCK_1,
                )  # fmt: skip
                scores = tl.dot(q_1, k_1, scores)
            if KIND == "int8":
                by_token = token_scale(
                    k_scale_ptr, page, slot, readable, kv_head, num_kv_heads, PAGE
                )
                scores *= by_token[None, :]
            unit = factor
            if cap is not None:
                # tanh(x) = 1 - 2 / (e**2x + 1); 2**126 is as good as infinity there.
                exponent = tl.minimum(scores * factor, 126.0, propagate_nan=tl.PropagateNan.ALL)
                power = tl.exp2(exponent)
                scores = cap * (1.0 - 2.0 / (power + 1.0))
                unit = 1.0
            if EDGE:
                seen = readable[None, :]
                if CAUSAL:
                    seen = seen & (key[None, :] <= position[:, None])
                if window is not None:
                    seen = seen & (key[None, :] > position[:, None] - window)
                scores = tl.where(seen, scores, -float("inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1) * unit)
            origin = new_largest
            if EDGE:  # a query that has seen nothing yet
                origin = tl.where(new_largest == -float("inf"), 0.0, new_largest)
            p = tl.exp2(scores * unit - origin[:, None])
            shrink = tl.exp2(largest - origin)
            total = total * shrink + tl.sum(p, 1)
            largest = new_largest
            p = p.to(dtype)
            v_0 = load_values(
                v_tile_ptr, v_scale_ptr, v_min_ptr, page, slot, readable, kv_head, num_kv_heads,
                stride_v_page, stride_v_token, 0,
                dtype, KIND, HEAD_DIM, PAGE, 0, WIDTH_0, BLOCK_0,
            )  # fmt: skip
            if KIND == "int8":  # into the values: probabilities times a small scale underflow
                by_token = token_scale(
                    v_scale_ptr, page, slot, readable, kv_head, num_kv_heads, PAGE
                )
                v_0 = (v_0.to(tl.float32) * by_token[:, None]).to(dtype)
            acc_0 = tl.dot(p, v_0, acc_0 * shrink[:, None])
            if WIDTH_1 > 0:
                v_1 = load_values(
                    v_tile_ptr, v_scale_ptr, v_min_ptr, page, slot, readable, kv_head, num_kv_heads,
                    stride_v_page, stride_v_token, 0,
                    dtype, KIND, HEAD_DIM, PAGE, WIDTH_0, WIDTH_1, BLOCK_1,
                )  # fmt: skip
                if KIND == "int8":
                    v_1 = (v_1.to(tl.float32) * by_token[:, None]).to(dtype)
                acc_1 = tl.dot(p, v_1, acc_1 * shrink[:, None])
            tile = next_tile
            page = next_page

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        new_largest = tl.maximum(largest, sink)
        origin = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weight = tl.exp2(largest - origin)
        total = total * weight + tl.exp2(sink - origin)
        largest = new_largest
    else:
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    some = total != 0.0  # NaN is passed on
    total = tl.where(some, total, 1.0)
    weight = weight / total * head_scale(v_scale_ptr, kv_head, KIND)
    out_ptrs = out_ptr + ((q_start + start_m + m) * num_heads + head)[:, None] * HEAD_DIM
    out_0 = (acc_0 * weight[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs + channel_0[None, :], out_0, mask=mask_0)
    if WIDTH_1 > 0:
        out_1 = (acc_1 * weight[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + WIDTH_0 + channel_1[None, :], out_1, mask=mask_1)
    if lse_ptr is not None:
        lse = tl.where(some, (largest + tl.log2(total)) * 0.6931471805599453, -float("inf"))
        lse_ptrs = lse_ptr + head.to(tl.int64) * total_q + q_start + start_m + m
        tl.store(lse_ptrs, lse, mask=start_m + m < q_len)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Tiles of queries and of keys, warps of a program, stages of its loops."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def shipped_config(
    head_dim: int,
    max_seqlen_q: int,
    kind: Kind,
    chip: int | str,
    window: int | None = None,
) -> PrefillConfig:
    """The largest tiles whose registers do not spill.

    Args:
        head_dim: channels.
        max_seqlen_q: queries of the longest sequence.
        kind: of the cache; of packed keys 16-bit.
        chip: its ``architecture``.
        window: keys that a query sees.
    """
    block_m, num_warps = (64, 4) if max_seqlen_q <= 64 else (128, 8)
    plain, narrow = kind == "16-bit", head_dim <= 128
    if isinstance(chip, str):
        return PrefillConfig(block_m, 64 if narrow and plain else 32, 4, 1)
    if 90 <= chip < 120:
        if not narrow:
            return PrefillConfig(block_m, 64 if plain else 32, 8, 2)
        if plain and window is None:
            return PrefillConfig(block_m, block_m, num_warps, 3 if head_dim < 96 else 2)
        # Less of a tile lies outside a window if the tile is small.
        return PrefillConfig(block_m, 64, num_warps, 3 if plain else 2)
    # What follows fits the 99 KiB of shared memory of 8.6, 8.9 and 12.0 too.
    if narrow:
        stages = 3 if head_dim < 128 and plain else 2
        return PrefillConfig(block_m, 64 if plain else 32, num_warps, stages)
    if head_dim == 192:
        return PrefillConfig(64, 32, 4, 2) if plain else PrefillConfig(128, 16, 8, 2)
    block_n = 64 if plain else 32
    if chip not in (80, 87) and kind in ("16-bit", "int4"):
        block_n //= 2
    return PrefillConfig(64, block_n, 8, 2)


def candidate_configs(head_dim: int) -> list[PrefillConfig]:
    """What is worth timing on compute capability 9.0: what its shared memory and registers hold."""
    narrow = [(128, 64, 8), (64, 64, 4), (128, 128, 8)]
    tiles = narrow if head_dim <= 128 else [(128, 64, 8), (128, 32, 8), (64, 64, 8)]
    return [
        PrefillConfig(m, n, warps, stages)
        for m, n, warps in tiles
        for stages in (2, 3, 4)
        if 2 * head_dim * (m + 2 * stages * n) <= SHARED_BYTES
        and (head_dim < 128 or n < 128 or stages == 2)
    ]


def launch_attention_prefill(
    problem: PrefillProblem, return_lse: bool = False, config: PrefillConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """Output, and log-sum-exp if asked for, by the kernel.

    Raises:
        ValueError: shape, element type, stride, device or number that does not fit.
    """
    p = problem
    check_problem(p)
    check_launchable(**p.tensors())
    if p.num_sequences > MAX_SEQUENCES:
        raise ValueError(f"{p.num_sequences} sequences; a launch takes {MAX_SEQUENCES} at most")
    total_q, num_heads, head_dim = p.q.shape
    longest = min(p.max_seqlen_q, total_q)
    window = None if p.window is None else min(p.window, MAX_WINDOW)
    out = p.q.new_empty(p.q.shape)
    lse = p.q.new_empty(num_heads, total_q, dtype=torch.float32) if return_lse else None
    if p.q.numel() == 0 or longest == 0 or p.num_sequences == 0:
        return out, lse
    if isinstance(p.kv, PackedTokens):
        cache, table = PagedKV(p.kv.k[None], p.kv.v[None]), None  # all in one page
        lengths, mean_length = p.kv.cu_seqlens, p.kv.k.shape[0] // p.num_sequences
    else:
        cache, table, lengths = p.kv.cache, p.kv.block_table, p.kv.lengths
        mean_length = table.shape[1] * cache.page_size
    config = config or shipped_config(head_dim, longest, p.kind, architecture(p.q.device), window)
    width = head_dim // 2 if p.kind == "int4" else min(128, 2 ** (head_dim.bit_length() - 1))
    factor, cap = p.factor * LOG2_E, None
    if p.softcap is not None:
        factor, cap = 2.0 * factor / p.softcap, p.softcap * LOG2_E
    num_tiles = triton.cdiv(longest, config.block_m)
    group = num_heads // p.num_kv_heads
    launch(
        _prefill_kernel,
        (num_tiles * num_heads, p.num_sequences),
        p.q,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        cache.k_min,
        cache.v_min,
        p.sinks,
        p.cu_seqlens_q,
        lengths,
        table,
        out,
        lse,
        factor,
        cap,
        window,
        total_q,
        num_tiles,
        num_heads,
        p.num_kv_heads,
        group * _kv_heads_at_once(cache, mean_length),
        0 if table is None else table.stride(0),
        *p.q.stride()[:2],
        *cache.k.stride()[:3],
        *cache.v.stride()[:3],
        SAME_STRIDES=cache.k.stride() == cache.v.stride(),
        KIND=p.kind,
        PAGE=0 if table is None else cache.page_size,
        CAUSAL=p.causal,
        HEAD_DIM=head_dim,
        WIDTH_0=width,
        WIDTH_1=head_dim - width,
        BLOCK_0=triton.next_power_of_2(width),
        BLOCK_1=max(16, triton.next_power_of_2(head_dim - width)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def _kv_heads_at_once(cache: PagedKV, length: int) -> int:
    """The most kv heads, a divisor of their number, whose keys and values stay in the L2 cache."""
    head_bytes = 2 * length * cache.k.shape[3] * cache.k.element_size()
    fitting = max(1, L2_BYTES // max(1, head_bytes))
    heads = cache.num_kv_heads
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fitting)
