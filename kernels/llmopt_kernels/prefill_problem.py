"""What attention_prefill is asked: packed queries, where the keys lie, and options."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.decode_problem import CachedTokens
from llmopt_kernels.launching import (
    check_choice,
    check_dtype,
    check_last_contiguous,
    check_shape,
)
from llmopt_kernels.paged_kv import HEAD_DIMS, Kind, check_block_table, check_cache

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Keys and values of a batch, one sequence after another.

    Attributes:
        k: ``(total_kv, kv_heads, head_dim)``.
        v: likewise; the strides may differ.
        cu_seqlens: ``(sequences + 1,) int32``, from 0 to ``total_kv``.
    """

    k: Tensor
    v: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True, slots=True)
class PrefillProblem:
    """What attention_prefill computes; see there for the attributes."""

    q: Tensor
    kv: PackedTokens | CachedTokens
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    scale: float | None = None

    @property
    def factor(self) -> float:
        """Scale of the scores."""
        return float(self.q.shape[2] ** -0.5) if self.scale is None else self.scale

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return int(self.cu_seqlens_q.shape[0]) - 1

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        if isinstance(self.kv, PackedTokens):
            return int(self.kv.k.shape[1])
        return self.kv.cache.num_kv_heads

    @property
    def kind(self) -> Kind:
        """How the keys are stored."""
        return "16-bit" if isinstance(self.kv, PackedTokens) else self.kv.cache.kind

    def tensors(self) -> dict[str, Tensor | None]:
        """All parts by name."""
        own = {"q": self.q, "cu_seqlens_q": self.cu_seqlens_q, "sinks": self.sinks}
        if isinstance(self.kv, PackedTokens):
            return {**own, "k": self.kv.k, "v": self.kv.v, "cu_seqlens_k": self.kv.cu_seqlens}
        tables = {"block_table": self.kv.block_table, "kv_lengths": self.kv.lengths}
        return {**own, **tables, **self.kv.cache.tensors()}


def check_problem(problem: PrefillProblem, check_values: bool = False) -> None:
    """Hold that a problem fits together.

    Args:
        problem: all of it.
        check_values: hold that bounds, lengths and pages lie in their tensors; waits for the
            device.

    Raises:
        ValueError: shape, element type, stride or number that does not fit; says what it got.
    """
    p = problem
    check_shape("q", p.q, (None, None, None))
    check_dtype("q", p.q, DTYPES)
    check_last_contiguous("q", p.q)
    check_choice("head dimension", p.q.shape[2], HEAD_DIMS)
    _check_index("cu_seqlens_q", p.cu_seqlens_q, (None,))
    if p.num_sequences < 0:
        raise ValueError("cu_seqlens_q is empty; it starts with 0")
    if p.max_seqlen_q < 0:
        raise ValueError(f"max_seqlen_q is {p.max_seqlen_q}; it must not be negative")
    if isinstance(p.kv, PackedTokens):
        _check_packed(p.q, p.kv, p.cu_seqlens_q)
    else:
        _check_cached(p.q, p.kv, p.num_sequences)
    if p.num_kv_heads == 0 or p.q.shape[1] % p.num_kv_heads:
        raise ValueError(f"{p.q.shape[1]} query heads do not share {p.num_kv_heads} kv heads")
    if p.window is not None and not (p.causal and p.window > 0):
        raise ValueError(
            f"window is {p.window} and causal {p.causal}; it is 1 or more keys, with causal alone"
        )
    for name, value in (("softcap", p.softcap), ("scale", p.scale)):
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be positive")
    if p.sinks is not None:
        check_shape("sinks", p.sinks, (p.q.shape[1],))
        check_dtype("sinks", p.sinks, (torch.float32, *DTYPES))
        check_last_contiguous("sinks", p.sinks)
    if check_values:
        _check_values(p)


def _check_packed(q: Tensor, kv: PackedTokens, cu_seqlens_q: Tensor) -> None:
    check_shape("k", kv.k, (None, None, q.shape[2]))
    check_shape("v", kv.v, kv.k.shape)
    for name, x in (("k", kv.k), ("v", kv.v)):
        check_dtype(name, x, (q.dtype,))
        check_last_contiguous(name, x)
    _check_index("cu_seqlens_k", kv.cu_seqlens, cu_seqlens_q.shape)


def _check_cached(q: Tensor, kv: CachedTokens, num_sequences: int) -> None:
    check_cache(kv.cache)
    if kv.cache.head_dim != q.shape[2]:
        raise ValueError(f"the cache has head dimension {kv.cache.head_dim}, q {q.shape[2]}")
    if kv.cache.kind == "16-bit":
        check_dtype("the cache's k", kv.cache.k, (q.dtype,))
    check_shape("block_table", kv.block_table, (num_sequences, None))
    check_dtype("block_table", kv.block_table, (torch.int32,))
    check_last_contiguous("block_table", kv.block_table)
    _check_index("kv_lengths", kv.lengths, (num_sequences,))


def _check_values(problem: PrefillProblem) -> None:
    p, kv = problem, problem.kv
    _check_bounds("cu_seqlens_q", p.cu_seqlens_q, "q", p.q)
    longest = max(p.cu_seqlens_q.diff().tolist(), default=0)
    if longest > p.max_seqlen_q:
        raise ValueError(f"max_seqlen_q is {p.max_seqlen_q}; a sequence has {longest} queries")
    if isinstance(kv, PackedTokens):
        _check_bounds("cu_seqlens_k", kv.cu_seqlens, "k", kv.k)
        return
    for index, length in enumerate(kv.lengths.tolist()):
        if length < 0:
            raise ValueError(f"kv_lengths[{index}] is {length}; it must not be negative")
    check_block_table(kv.block_table, kv.lengths, kv.cache)


def _check_bounds(name: str, bounds: Tensor, tokens_name: str, tokens: Tensor) -> None:
    values = bounds.tolist()
    if values[0] != 0 or values != sorted(values) or values[-1] > tokens.shape[0]:
        raise ValueError(
            f"{name} is {values}; it must rise from 0 to at most the {tokens.shape[0]} tokens of "
            f"{tokens_name}"
        )


def _check_index(name: str, index: Tensor, shape: tuple[int | None, ...]) -> None:
    check_shape(name, index, shape)
    check_dtype(name, index, (torch.int32,))
    check_last_contiguous(name, index)
