"""Attention of one or a few new tokens a sequence against its paged KV cache.

With ``s_ij = scale * q_i . k_j``, soft-capped to ``cap * tanh(s_ij / cap)`` if asked for, and the
keys ``V(i)`` that query ``i`` may see::

    out_i = sum_{j in V(i)} exp(s_ij) v_j / (sum_{j in V(i)} exp(s_ij) + exp(sink of the head))
    lse_i = ln of that denominator

The last ``num_queries`` tokens of a sequence are its queries. A query sees the tokens before them
and, of them, those up to itself (a chain), or its ancestors and itself in a tree of drafted tokens
(SpecInfer, arXiv:2305.09781), and of all that the last ``window`` positions.

The sequence is split over programs (Flash-Decoding; FlashAttention, arXiv:2205.14135), whose
partial results ``attention_merge`` joins. The heads that share a kv head, times the queries, are
the rows of one matrix product. Cached codes become 16 bit in registers (``paged_kv_tile``).

Every sequence has the same number of queries, so that one captured CUDA graph serves a batch
size; a shorter tree is padded with tokens that nobody sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_kernels.attention_decode_config import DecodeConfig, shipped_config
from llmopt_kernels.attention_merge import MAX_SPLITS, choose_num_splits, launch_merge
from llmopt_kernels.decode_problem import CachedTokens, DecodeProblem, check_problem
from llmopt_kernels.launching import architecture, check_launchable, launch, runs_kernel
from llmopt_kernels.paged_kv import Kind, PagedKV, gather
from llmopt_kernels.paged_kv_tile import (
    find_pages,
    head_scale,
    load_keys,
    load_values,
    load_values_of_pairs,
    token_scale,
)
from llmopt_kernels.triton_or_stub import tl, triton


def attention_decode(
    q: Tensor,
    cache: PagedKV,
    block_table: Tensor,
    kv_lengths: Tensor,
    *,
    max_kv_length: int,
    num_queries: int = 1,
    tree_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    recent: PagedKV | None = None,
    recent_block_table: Tensor | None = None,
    recent_lengths: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    check_values: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from the last tokens of each sequence to its cached tokens, themselves included.

    Args:
        q: ``(sequences * num_queries, q_heads, head_dim)`` bfloat16 or float16.
        cache: the pool; a 16-bit one has the element type of ``q``.
        block_table: ``(sequences, pages) int32``.
        kv_lengths: ``(sequences,) int32`` tokens in the cache, the queries' own included. A
            sequence of 0 tokens gets zeros.
        max_kv_length: a bound of ``kv_lengths`` known to the host; it only chooses the splits.
        num_queries: tokens a sequence.
        tree_mask: ``(sequences, num_queries) int64``, which of the queries a query sees, as bits
            (``pack_tree_mask``); its own bit is usually set. None is a chain.
        window: positions that a query sees, its own included; up to 2**30. In a tree a query's
            position is the number of tokens before the tree plus its ancestors.
        softcap: bound of the scores.
        sinks: ``(q_heads,)`` a logit of each head that joins the denominator.
        scale: of the scores; None is ``head_dim ** -0.5``.
        recent: a 16-bit pool with the tokens that follow those of ``cache``: KIVI
            (arXiv:2402.02750) keeps the latest unquantized.
        recent_block_table: of ``recent``.
        recent_lengths: of ``recent``.
        num_splits: parts of a sequence that are worked on at once; None chooses.
        return_lse: give the log-sum-exp too.
        check_values: read lengths and block tables and hold that they are in range; for debugging.

    Returns:
        ``(sequences * num_queries, q_heads, head_dim)`` in the type of ``q``; with ``return_lse``
        also ``(sequences * num_queries, q_heads)`` float32, natural, sinks included, ``-inf``
        where a row sees nothing.

    Raises:
        ValueError: shape, element type, stride, device or number that does not fit.
    """
    stores = [CachedTokens(cache, block_table, kv_lengths)]
    if recent is not None and recent_block_table is not None and recent_lengths is not None:
        stores.append(CachedTokens(recent, recent_block_table, recent_lengths))
    elif any(part is not None for part in (recent, recent_block_table, recent_lengths)):
        raise ValueError("recent, recent_block_table and recent_lengths go together")
    problem = DecodeProblem(
        q,
        tuple(stores),
        num_queries,
        max_kv_length,
        scale if scale is not None else q.shape[-1] ** -0.5,
        tree_mask,
        window,
        softcap,
        sinks,
    )
    check_problem(problem, check_values)
    if runs_kernel(q):
        out, lse = launch_attention_decode(problem, num_splits)
    else:
        out, lse = attention_decode_reference(problem, torch.float32)
        out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def attention_decode_reference(
    problem: DecodeProblem, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in ``dtype``, one sequence after another."""
    p = problem
    outs = [p.q.new_zeros(0, *p.q.shape[1:], dtype=dtype)]
    lses = [p.q.new_zeros(0, p.q.shape[1], dtype=dtype)]
    for index in range(p.num_sequences):
        parts = [
            gather(s.cache, s.block_table[index], int(s.lengths[index]), dtype) for s in p.stores
        ]
        k, v = (torch.cat(part).repeat_interleave(p.group, 1) for part in zip(*parts, strict=True))
        q = p.q[index * p.num_queries : (index + 1) * p.num_queries].to(dtype)
        scores = torch.einsum("qhd,khd->hqk", q, k) * p.scale
        if p.softcap is not None:
            scores = p.softcap * torch.tanh(scores / p.softcap)
        visible = _visible(p, index, k.shape[0])
        scores = scores.masked_fill(~visible, -torch.inf)
        # What nobody sees, the padding of a tree, may hold anything: 0 times NaN would be NaN.
        v = v.masked_fill(~visible.any(0)[:, None, None], 0.0)
        sinks = scores.new_full(scores.shape[:1], -torch.inf)
        if p.sinks is not None:
            sinks = p.sinks.to(dtype)
        sinks = sinks[:, None].expand(scores.shape[:2])
        lse = torch.logsumexp(torch.cat([scores, sinks[..., None]], -1), -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        lses.append(lse.T)
    return torch.cat(outs), torch.cat(lses)


def _visible(problem: DecodeProblem, index: int, num_tokens: int) -> Tensor:
    """Which tokens the queries of one sequence see: ``(num_queries, num_tokens)`` bool."""
    device, num_queries = problem.q.device, problem.num_queries
    before = num_tokens - num_queries  # tokens that come before the queries
    query = torch.arange(num_queries, device=device)[:, None]
    tail = torch.arange(num_tokens, device=device) - before
    if problem.tree_mask is None:
        visible, position = tail <= query, before + query
    else:
        bits = problem.tree_mask[index][:, None] >> query.T & 1
        visible = (tail < 0) | bits[:, tail.clamp(0)].bool()
        position = before + bits.sum(-1, keepdim=True) - 1
    if problem.window is not None:
        visible = visible & (tail + before > position - problem.window)
    return visible


@triton.jit(
    do_not_specialize=[
        "window",
        "num_queries",
        "num_row_blocks",
        "num_splits",
        "first_part",
        "num_rows",
    ]
)
def _decode_kernel(
    q_ptr,
    out_ptr,
    lse_ptr,
    k_ptr,
    k_scale_ptr,
    k_min_ptr,
    v_ptr,
    v_scale_ptr,
    v_min_ptr,
    table_ptr,
    lengths_ptr,
    later_ptr,
    tree_ptr,
    scale,
    softcap,
    window,
    num_queries,
    num_kv_heads,
    num_row_blocks,
    num_splits,
    first_part,
    num_rows,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    stride_table,
    KIND: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH_0: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A head is worked on in two column ranges: see ``_column_ranges``.
    WIDTH_1: tl.constexpr = HEAD_DIM - WIDTH_0
    EIGHT_BIT: tl.constexpr = KIND == "fp8" or KIND == "int8"
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    # Sequences are on the first axis of the grid: the others end at 65535.
    row_block = tl.program_id(0) % num_row_blocks
    kv_head = tl.program_id(0) // num_row_blocks % num_kv_heads
    sequence = (tl.program_id(0) // (num_row_blocks * num_kv_heads)).to(tl.int64)
    split = tl.program_id(1)

    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_queries * GROUP
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    token = sequence * num_queries + query
    column_0 = tl.arange(0, BLOCK_0)
    column_1 = tl.arange(0, BLOCK_1)
    q_row_ptr = q_ptr + token * stride_q_token + head.to(tl.int64) * stride_q_head
    q_0 = tl.load(
        q_row_ptr[:, None] + column_0[None, :],
        mask=is_row[:, None] & (column_0 < WIDTH_0)[None, :],
        other=0.0,
    )
    q_1 = tl.load(
        q_row_ptr[:, None] + WIDTH_0 + column_1[None, :],
        mask=is_row[:, None] & (column_1 < WIDTH_1)[None, :],
        other=0.0,
    )

    # Positions below count from the first token of this store, not of the sequence.
    length = tl.load(lengths_ptr + sequence)
    first_query = length - num_queries
    if later_ptr is not None:
        first_query += tl.load(later_ptr + sequence)
    position = first_query + query
    if tree_ptr is not None:
        tree = tl.load(tree_ptr + token, mask=is_row, other=0)
        position = first_query + _count_bits(tree) - 1
        seen_of_tree = tl.reduce(tree, 0, _or)
    else:  # of a chain, a block of rows sees up to its last query
        last_query = tl.minimum(row_block * BLOCK_M + BLOCK_M - 1, num_queries * GROUP - 1) // GROUP
        length = tl.minimum(length, first_query + last_query + 1)
    first_token = 0
    if window is not None:
        lowest = tl.min(tl.where(is_row, position, 2147483647), 0) - window + 1
        first_token = tl.maximum(lowest, 0)

    first_tile = first_token // BLOCK_N
    num_tiles = tl.cdiv(length, BLOCK_N) - first_tile
    tiles_per_split = tl.cdiv(tl.maximum(num_tiles, 0), num_splits)
    start = (first_tile + split * tiles_per_split) * BLOCK_N
    end = tl.minimum(start + tiles_per_split * BLOCK_N, length)

    table_row_ptr = table_ptr + sequence * stride_table
    scale *= head_scale(k_scale_ptr, kv_head, KIND)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    out_0 = tl.zeros((BLOCK_M, BLOCK_0), tl.float32)
    out_1 = tl.zeros((BLOCK_M, BLOCK_1), tl.float32)
    page = find_pages(table_row_ptr, start, first_token, end, BLOCK_N, PAGE)
    for tile in range(start, end, BLOCK_N):
        tokens = tile + tl.arange(0, BLOCK_N)
        # A page that has left the window may have been given away: its tokens are not read.
        readable = (tokens >= first_token) & (tokens < end)
        tail = tokens - first_query
        if tree_ptr is not None:
            # Nor are tokens that no row sees, the padding of a tree: 0 times NaN would be NaN.
            bit = tl.minimum(tl.maximum(tail, 0), 63).to(tl.int64)
            readable = readable & ((tail < 0) | (((seen_of_tree >> bit) & 1) != 0))
        slot = tokens % PAGE
        next_page = find_pages(table_row_ptr, tile + BLOCK_N, first_token, end, BLOCK_N, PAGE)
        keys_0 = load_keys(
            k_ptr, k_scale_ptr, k_min_ptr, page, slot, readable, kv_head, num_kv_heads,
            stride_k_page, stride_k_token, stride_k_head,
            DTYPE, KIND, HEAD_DIM, 0, WIDTH_0, BLOCK_0,
        )  # fmt: skip
        keys_1 = load_keys(
            k_ptr, k_scale_ptr, k_min_ptr, page, slot, readable, kv_head, num_kv_heads,
            stride_k_page, stride_k_token, stride_k_head,
            DTYPE, KIND, HEAD_DIM, WIDTH_0, WIDTH_1, BLOCK_1,
        )  # fmt: skip
        scores = tl.dot(q_1, keys_1, tl.dot(q_0, keys_0)) * scale
        if KIND == "int8":
            by_token = token_scale(k_scale_ptr, page, slot, readable, kv_head, num_kv_heads, PAGE)
            scores *= by_token[None, :]
        if softcap is not None:
            scores = softcap * _tanh(scores / softcap)

        if tree_ptr is not None:
            visible = (tail < 0)[None, :] | (((tree[:, None] >> bit[None, :]) & 1) != 0)
        else:
            visible = tail[None, :] <= query[:, None]
        if window is not None:
            visible = visible & (tokens[None, :] > (position - window)[:, None])
        visible = visible & readable[None, :]

        scores = tl.where(visible, scores * 1.4426950408889634, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        p = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(largest - origin)
        denominator = denominator * shrink + tl.sum(p, 1)
        largest = new_largest

        if EIGHT_BIT:
            values_0 = load_values_of_pairs(
                v_ptr, page, slot, readable, kv_head,
                stride_v_page, stride_v_token, stride_v_head, DTYPE, KIND, HEAD_DIM, 0, BLOCK_0,
            )  # fmt: skip
            values_1 = load_values_of_pairs(
                v_ptr, page, slot, readable, kv_head,
                stride_v_page, stride_v_token, stride_v_head, DTYPE, KIND, HEAD_DIM, 1, BLOCK_1,
            )  # fmt: skip
        else:
            values_0 = load_values(
                v_ptr, v_scale_ptr, v_min_ptr, page, slot, readable, kv_head, num_kv_heads,
                stride_v_page, stride_v_token, stride_v_head,
                DTYPE, KIND, HEAD_DIM, PAGE, 0, WIDTH_0, BLOCK_0,
            )  # fmt: skip
            values_1 = load_values(
                v_ptr, v_scale_ptr, v_min_ptr, page, slot, readable, kv_head, num_kv_heads,
                stride_v_page, stride_v_token, stride_v_head,
                DTYPE, KIND, HEAD_DIM, PAGE, WIDTH_0, WIDTH_1, BLOCK_1,
            )  # fmt: skip
        if KIND == "int8":
            by_token = token_scale(v_scale_ptr, page, slot, readable, kv_head, num_kv_heads, PAGE)
            if tl.float16 == DTYPE:  # probabilities times a small scale underflow
                values_0 = (values_0.to(tl.float32) * by_token[:, None]).to(DTYPE)
                values_1 = (values_1.to(tl.float32) * by_token[:, None]).to(DTYPE)
            else:
                p *= by_token[None, :]
        p = p.to(DTYPE)
        out_0 = tl.dot(p, values_0, out_0 * shrink[:, None])
        out_1 = tl.dot(p, values_1, out_1 * shrink[:, None])
        page = next_page

    empty = denominator == 0.0  # NaN is not: it is passed on
    safe = tl.where(empty, 1.0, denominator)
    factor = (head_scale(v_scale_ptr, kv_head, KIND) / safe)[:, None]
    at = (first_part + split).to(tl.int64) * num_rows + token * (num_kv_heads * GROUP) + head
    lse = tl.where(empty, -float("inf"), largest + tl.log2(safe))
    tl.store(lse_ptr + at, lse, mask=is_row)
    # An empty part says so by its lse; its output is not written and not read.
    out_row_ptr = (out_ptr + at * HEAD_DIM)[:, None]
    seen = is_row & (denominator != 0.0)
    mask_0 = seen[:, None] & (column_0 < WIDTH_0)[None, :]
    mask_1 = seen[:, None] & (column_1 < WIDTH_1)[None, :]
    if EIGHT_BIT:  # even and odd channels
        tl.store(out_row_ptr + 2 * column_0[None, :], out_0 * factor, mask=mask_0)
        tl.store(out_row_ptr + 2 * column_1[None, :] + 1, out_1 * factor, mask=mask_1)
    else:
        tl.store(out_row_ptr + column_0[None, :], out_0 * factor, mask=mask_0)
        tl.store(out_row_ptr + WIDTH_0 + column_1[None, :], out_1 * factor, mask=mask_1)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def _count_bits(x):
    """Set bits of int64, as int32: pairs, nibbles, bytes, then the sum of the bytes."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    x += x >> 32
    return (x & 127).to(tl.int32)


def launch_attention_decode(
    problem: DecodeProblem,
    num_splits: int | None = None,
    config: DecodeConfig | None = None,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the kernels; reads no values, so a CUDA graph may capture it.

    Args:
        problem: what to compute.
        num_splits: parts of the first store; None chooses.
        config: of the kernel over the first store; None is the shipped one.
        check_values: read lengths and block tables, and hold that they are in range.

    Raises:
        ValueError: shape, element type, stride, device or number that does not fit.
    """
    check_problem(problem, check_values)
    p, (num_tokens, num_heads, head_dim) = problem, problem.q.shape
    tensors = {f"{n}{i}": t for i, s in enumerate(p.stores) for n, t in s.cache.tensors().items()}
    tables = {f"block_table{i}": s.block_table for i, s in enumerate(p.stores)}
    lengths = {f"lengths{i}": s.lengths for i, s in enumerate(p.stores)}
    check_launchable(q=p.q, tree_mask=p.tree_mask, sinks=p.sinks, **tensors, **tables, **lengths)
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits}; use 1 to {MAX_SPLITS}")
    out = torch.empty_like(p.q, memory_format=torch.contiguous_format)
    lse = p.q.new_empty(num_tokens, num_heads, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    splits = [num_splits or _num_splits(p, p.max_kv_length)]
    for store in p.stores[1:]:  # a short one, and its table is as narrow
        splits.append(_num_splits(p, store.block_table.shape[1] * store.cache.page_size))
    partial_out = p.q.new_empty(sum(splits), num_tokens, num_heads, head_dim, dtype=torch.float32)
    partial_lse = p.q.new_empty(sum(splits), num_tokens, num_heads, dtype=torch.float32)
    for index in range(len(p.stores)):
        _launch_store(
            p,
            index,
            partial_out,
            partial_lse,
            splits[index],
            sum(splits[:index]),
            config if index == 0 else None,
        )
    launch_merge(partial_out, partial_lse, p.sinks, out, lse)
    return out, lse


def _launch_store(
    problem: DecodeProblem,
    index: int,
    partial_out: Tensor,
    partial_lse: Tensor,
    num_splits: int,
    first_part: int,
    config: DecodeConfig | None,
) -> None:
    p, store = problem, problem.stores[index]
    cache = store.cache
    block_m = _block_m(p)
    num_row_blocks = triton.cdiv(p.num_queries * p.group, block_m)
    chip = architecture(p.q.device)
    config = config or shipped_config(cache.kind, cache.head_dim, cache.page_size, block_m, chip)
    width_0, block_0, block_1 = _column_ranges(cache.kind, cache.head_dim)
    launch(
        _decode_kernel,
        (p.num_sequences * cache.num_kv_heads * num_row_blocks, num_splits),
        p.q,
        partial_out,
        partial_lse,
        cache.k,
        cache.k_scale,
        cache.k_min,
        cache.v,
        cache.v_scale,
        cache.v_min,
        store.block_table,
        store.lengths,
        p.stores[1].lengths if index == 0 and len(p.stores) == 2 else None,
        p.tree_mask,
        float(p.scale),
        None if p.softcap is None else float(p.softcap),
        p.window,
        p.num_queries,
        cache.num_kv_heads,
        num_row_blocks,
        num_splits,
        first_part,
        p.q.shape[0] * p.q.shape[1],
        *p.q.stride()[:2],
        *cache.k.stride()[:3],
        *cache.v.stride()[:3],
        store.block_table.stride(0),
        KIND=cache.kind,
        PAGE=cache.page_size,
        GROUP=p.group,
        HEAD_DIM=cache.head_dim,
        WIDTH_0=width_0,
        BLOCK_0=block_0,
        BLOCK_1=block_1,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _num_splits(problem: DecodeProblem, num_tokens: int) -> int:
    p, device = problem, problem.q.device
    on_gpu = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
    blocks = triton.cdiv(p.num_queries * p.group, _block_m(p))
    heads = p.stores[0].cache.num_kv_heads
    if p.window is not None:
        num_tokens = min(num_tokens, p.window + p.num_queries)
    return choose_num_splits(p.num_sequences, heads, blocks, num_tokens, sms)


def _block_m(problem: DecodeProblem) -> int:
    """Rows a program: as many as there are, within what a matrix unit takes and registers hold."""
    rows = int(triton.next_power_of_2(problem.num_queries * problem.group))
    return min(64 if problem.q.shape[2] <= 128 else 32, max(16, rows))


def _column_ranges(kind: Kind, head_dim: int) -> tuple[int, int, int]:
    """Width of the first of two column ranges, and both padded to powers of two.

    int4 is cut where its nibbles are, fp8 and int8 into halves too, whose values are the even and
    the odd channels; at 16 bit 80, 96 and 192 channels become 64 + 16, 64 + 32 and 128 + 64,
    without padding.
    """
    if kind != "16-bit":
        half = int(triton.next_power_of_2(head_dim // 2))
        return head_dim // 2, half, half
    first = int(triton.next_power_of_2(head_dim)) // 2
    return first, first, int(triton.next_power_of_2(head_dim - first))
