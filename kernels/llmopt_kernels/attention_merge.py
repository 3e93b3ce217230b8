"""Merge the partial results of attention over parts of a sequence (Flash-Decoding).

Part ``s`` gives its normalized output ``o_s`` and ``a_s``, the base-2 logarithm of its softmax's
denominator; ``-inf``, with any output, where it sees no key. With an optional sink ``b``, a logit
that joins the denominator and has no value::

    out = sum_s 2**a_s * o_s / (sum_s 2**a_s + e**b)
    lse = ln(sum_s 2**a_s + e**b)

A row that no part has seen a key for is 0, and its ``lse`` the sink or ``-inf``.
"""

from __future__ import annotations

from torch import Tensor

from llmopt_kernels.launching import launch
from llmopt_kernels.triton_or_stub import tl, triton

MAX_SPLITS = 256
PARTS_PER_STEP = 16


def choose_num_splits(
    num_sequences: int, num_kv_heads: int, num_row_blocks: int, num_tokens: int, num_sms: int
) -> int:
    """Parts of a sequence: enough programs for every multiprocessor, none of too few tokens.

    Eight programs a multiprocessor leave the last wave small. A part writes its rows' outputs in
    float32 and the merge reads them back, which 256 tokens (1024 of a full block of rows) outweigh.
    """
    programs = max(1, num_sequences * num_kv_heads * num_row_blocks)
    wanted = triton.cdiv(8 * num_sms, programs)
    longest = triton.cdiv(num_tokens, 256 if num_row_blocks == 1 else 1024)
    return int(max(1, min(wanted, longest, MAX_SPLITS)))


@triton.jit
def _merge_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    num_parts,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # token * heads + head
    channel = tl.arange(0, BLOCK_D)
    largest = -float("inf")
    denominator = 0.0
    if sinks_ptr is not None:
        largest = tl.load(sinks_ptr + row % num_heads).to(tl.float32) * 1.4426950408889634
        denominator = 1.0
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        lse = tl.load(
            partial_lse_ptr + part.to(tl.int64) * num_rows + row,
            mask=part < num_parts,
            other=-float("inf"),
        )
        # Where a part is empty its output was never written.
        out = tl.load(
            partial_out_ptr
            + (part.to(tl.int64) * num_rows + row)[:, None] * HEAD_DIM
            + channel[None, :],
            mask=(lse != -float("inf"))[:, None] & (channel < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(lse, 0))
        origin = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weight = tl.exp2(lse - origin)
        shrink = tl.exp2(largest - origin)
        total = total * shrink + tl.sum(weight[:, None] * out, 0)
        denominator = denominator * shrink + tl.sum(weight, 0)
        largest = new_largest
    seen = denominator != 0.0  # of NaN too, which is passed on
    safe = tl.where(seen, denominator, 1.0)
    tl.store(
        out_ptr + row * HEAD_DIM + channel,
        (total / safe).to(out_ptr.dtype.element_ty),
        mask=channel < HEAD_DIM,
    )
    if lse_ptr is not None:
        natural = (largest + tl.log2(safe)) * 0.6931471805599453
        tl.store(lse_ptr + row, tl.where(seen, natural, -float("inf")))


def launch_merge(
    partial_out: Tensor, partial_lse: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor | None
) -> None:
    """Merge into ``out`` and ``lse``; all tensors contiguous.

    Args:
        partial_out: ``(parts, tokens, heads, head_dim)`` float32.
        partial_lse: ``(parts, tokens, heads)`` float32, base 2.
        sinks: ``(heads,)``.
        out: ``(tokens, heads, head_dim)``.
        lse: ``(tokens, heads)`` float32, natural.
    """
    num_parts, num_tokens, num_heads, head_dim = partial_out.shape
    launch(
        _merge_kernel,
        (num_tokens * num_heads,),
        partial_out,
        partial_lse,
        sinks,
        out,
        lse,
        num_parts,
        num_tokens * num_heads,
        num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_PARTS=PARTS_PER_STEP,
        num_warps=4,
    )
