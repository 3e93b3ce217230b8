"""Load tiles of keys and values of one kv head out of the pages of a ``PagedKV``, in a kernel.

A tile is ``BLOCK_N`` tokens, aligned to ``BLOCK_N``, times some channels. Loading goes::

    tokens = start + tl.arange(0, BLOCK_N)
    readable = (tokens >= first) & (tokens < end)
    page = find_pages(table_row_ptr, start, first, end, BLOCK_N, PAGE)
    slot = tokens % PAGE
    keys = load_keys(k_ptr, ..., page, slot, ...)          # (channels, tokens), for q @ keys
    values = load_values(v_ptr, ..., page, slot, ...)      # (tokens, channels), for p @ values

Codes become the query's 16-bit type in registers. int4 comes out dequantized. fp8 and int8 come
out as bare codes, which both 16-bit types hold exactly; their scales are cheaper outside the
product, and left to the caller:

- fp8: ``head_scale`` of the keys multiplies the softmax scale, that of the values the output.
- int8: ``token_scale`` of the keys multiplies the scores, that of the values the probabilities.

A head is loaded in column ranges ``FIRST`` to ``FIRST + WIDTH``, each padded to ``BLOCK``, a power
of two: 192 channels as 128 and 64 need no padding. int4 wants its two halves, ``WIDTH = head_dim /
2``, which lie in the two nibbles of the same bytes: the compiler then reads those once.
"""

from __future__ import annotations

from llmopt_kernels.triton_or_stub import tl, triton


@triton.jit
def find_pages(table_row_ptr, start, first, end, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Pages of the tokens of a tile, int64: ``(1,)`` if it lies within one, else ``(BLOCK_N,)``.

    In a loop, ask for the pages of the next tile before working on this one: then the loads of
    keys and values do not wait for the block table, and the compiler can issue them early.

    Args:
        table_row_ptr: the sequence's row of the block table, int32.
        start: first token of the tile, a multiple of ``BLOCK_N``.
        first: tokens before it are not read, and what the block table says of them.
        end: nor are those from it on.
        BLOCK_N: tokens a tile, a power of two.
        PAGE: tokens a page.
    """
    if BLOCK_N <= PAGE:
        index = start // PAGE + tl.arange(0, 1)
        page = tl.load(table_row_ptr + index, mask=index * PAGE < end, other=0)
    else:
        tokens = start + tl.arange(0, BLOCK_N)
        readable = (tokens >= first) & (tokens < end)
        page = tl.load(table_row_ptr + tokens // PAGE, mask=readable, other=0)
    return page.to(tl.int64)


@triton.jit
def head_scale(scale_ptr, head, KIND: tl.constexpr):
    """The scale of a whole kv head: that of fp8, 1 of the other kinds."""
    scale = 1.0
    if KIND == "fp8":
        scale = tl.load(scale_ptr + head)
    return scale


@triton.jit
def token_scale(scale_ptr, page, slot, readable, head, num_heads, PAGE: tl.constexpr):
    """Scales (or minima) by token of one kv head: ``(BLOCK_N,)`` float32, 0 if not readable."""
    at = (page * PAGE + slot) * num_heads + head
    return tl.load(scale_ptr + at, mask=readable, other=0.0)


@triton.jit
def load_keys(
    k_ptr,
    scale_ptr,
    min_ptr,
    page,
    slot,
    readable,
    head,
    num_heads,
    stride_page,
    stride_token,
    stride_head,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels ``FIRST`` to ``FIRST + WIDTH`` of a tile's keys: ``(BLOCK, BLOCK_N)`` ``DTYPE``.

    Channels of the padding are 0. Tokens that are not readable mean nothing and may be NaN: mask
    their scores.

    Args:
        k_ptr: ``PagedKV.k``.
        scale_ptr: ``PagedKV.k_scale``; read of int4 alone, by page and channel.
        min_ptr: ``PagedKV.k_min``; likewise.
        page: from ``find_pages``.
        slot: of the tokens in their page.
        readable: ``(BLOCK_N,)``.
        head: kv head.
        num_heads: kv heads.
        stride_page: of ``k``, in elements, as the next two.
        stride_token: of ``k``.
        stride_head: of ``k``.
        DTYPE: the result's, 16 bit.
        KIND: that of the cache.
        HEAD_DIM: channels of a head.
        FIRST: first channel.
        WIDTH: channels.
        BLOCK: ``WIDTH`` padded to a power of two.
    """
    rows = page * stride_page + slot.to(tl.int64) * stride_token + head.to(tl.int64) * stride_head
    channel = tl.arange(0, BLOCK)
    is_channel = (channel < WIDTH)[:, None]
    mask = is_channel & readable[None, :]
    if KIND == "int4":
        column, shift = _nibbles(FIRST, WIDTH, BLOCK, HEAD_DIM)
        packed = tl.load(k_ptr + rows[None, :] + column[:, None], mask=mask, other=0)
        codes = ((packed >> shift[:, None]) & 15).to(tl.float32)
        # One row of scales a page: (BLOCK, 1) if the tile lies within a page.
        at = ((page * num_heads + head) * HEAD_DIM + FIRST)[None, :] + channel[:, None]
        scale = tl.load(scale_ptr + at, mask=is_channel, other=0.0)
        minimum = tl.load(min_ptr + at, mask=is_channel, other=0.0)
        keys = (codes * scale + minimum).to(DTYPE)
    else:
        ptrs = k_ptr + rows[None, :] + (FIRST + channel)[:, None]
        keys = tl.load(ptrs, mask=mask, other=0.0).to(DTYPE)
    return keys


@triton.jit
def load_values(
    v_ptr,
    scale_ptr,
    min_ptr,
    page,
    slot,
    readable,
    head,
    num_heads,
    stride_page,
    stride_token,
    stride_head,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels ``FIRST`` to ``FIRST + WIDTH`` of a tile's values: ``(BLOCK_N, BLOCK)`` ``DTYPE``.

    Tokens that are not readable are 0, so that a probability of 0 times them is 0. Arguments as of
    ``load_keys``; scale and minimum of int4 are by token.
    """
    rows = page * stride_page + slot.to(tl.int64) * stride_token + head.to(tl.int64) * stride_head
    channel = tl.arange(0, BLOCK)
    mask = readable[:, None] & (channel < WIDTH)[None, :]
    if KIND == "int4":
        column, shift = _nibbles(FIRST, WIDTH, BLOCK, HEAD_DIM)
        packed = tl.load(v_ptr + rows[:, None] + column[None, :], mask=mask, other=0)
        codes = ((packed >> shift[None, :]) & 15).to(tl.float32)
        scale = token_scale(scale_ptr, page, slot, readable, head, num_heads, PAGE)
        minimum = token_scale(min_ptr, page, slot, readable, head, num_heads, PAGE)
        values = (codes * scale[:, None] + minimum[:, None]).to(DTYPE)
    else:
        ptrs = v_ptr + rows[:, None] + (FIRST + channel)[None, :]
        values = tl.load(ptrs, mask=mask, other=0.0).to(DTYPE)
    return values


@triton.jit
def load_values_of_pairs(
    v_ptr,
    page,
    slot,
    readable,
    head,
    stride_page,
    stride_token,
    stride_head,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Even or odd channels of a tile's fp8 or int8 values: ``(BLOCK_N, BLOCK)`` ``DTYPE``.

    The product needs values transposed, which ``ldmatrix`` does of 16 bits: read two neighbouring
    channels as one element and split them in registers. By bytes it would take a load a value. The
    compiler reads once for both halves. Strides must be even; else as ``load_values``.
    """
    rows = page * stride_page + slot.to(tl.int64) * stride_token + head.to(tl.int64) * stride_head
    pair = tl.arange(0, BLOCK)
    row_ptr = (v_ptr + rows).to(tl.pointer_type(tl.int16), bitcast=True)
    mask = readable[:, None] & (pair < HEAD_DIM // 2)[None, :]
    pairs = tl.load(row_ptr[:, None] + pair[None, :], mask=mask, other=0)
    codes = (pairs >> 8 * ODD).to(tl.int8)
    if KIND == "fp8":
        codes = codes.to(tl.float8e4nv, bitcast=True)
    return codes.to(DTYPE)


@triton.jit
def _nibbles(FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Byte in a row and shift in that byte of ``BLOCK`` channels from ``FIRST`` on."""
    HALF: tl.constexpr = HEAD_DIM // 2
    channel = tl.arange(0, BLOCK)
    if FIRST % HALF + WIDTH <= HALF:  # within one nibble
        column = FIRST % HALF + channel
        shift = tl.full((BLOCK,), FIRST // HALF * 4, tl.uint8)
    else:
        column = (FIRST + channel) % HALF
        shift = ((FIRST + channel) // HALF * 4).to(tl.uint8)
    return column, shift
