"""What attention_decode is asked: queries, where their sequences' tokens lie, and options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.launching import check_dtype, check_last_contiguous, check_shape
from llmopt_kernels.paged_kv import PagedKV, check_block_table, check_cache

DTYPES = (torch.bfloat16, torch.float16)
MAX_TREE_QUERIES = 64
MAX_WINDOW = 1 << 30  # positions less a window stay within 32 bits


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """The tokens that each sequence of a batch has in one pool.

    Attributes:
        cache: the pool.
        block_table: ``(sequences, pages) int32``, the pages of each sequence in order.
        lengths: ``(sequences,) int32`` tokens; 0 is allowed.
    """

    cache: PagedKV
    block_table: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class DecodeProblem:
    """What attention_decode computes; see there for the attributes.

    ``stores`` are one or two, the second with the tokens that follow those of the first.
    """

    q: Tensor
    stores: tuple[CachedTokens, ...]
    num_queries: int
    max_kv_length: int
    scale: float
    tree_mask: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return int(self.stores[0].lengths.shape[0])

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return int(self.q.shape[1]) // self.stores[0].cache.num_kv_heads


def pack_tree_mask(mask: Tensor) -> Tensor:
    """Bits of a tree: bool ``(sequences, num_queries, num_queries)``, row sees column.

    Returns:
        ``(sequences, num_queries) int64``, bit ``j`` of row ``i`` set if ``i`` sees ``j``.

    Raises:
        ValueError: not square, or more than 64 queries.
    """
    check_shape("mask", mask, (None, mask.shape[-1], None))
    if mask.shape[-1] > MAX_TREE_QUERIES:
        raise ValueError(f"a tree of {mask.shape[-1]} tokens; the most is {MAX_TREE_QUERIES}")
    bit = torch.arange(mask.shape[-1], device=mask.device)
    return (mask.to(torch.int64) << bit).sum(-1)


def check_problem(problem: DecodeProblem, check_values: bool = False) -> None:
    """Hold that a problem fits together.

    Raises:
        ValueError: shape, element type, stride or number that does not fit; says what it got.
    """
    p, first = problem, problem.stores[0].cache
    check_shape("q", p.q, (None, None, None))
    check_dtype("q", p.q, DTYPES)
    check_last_contiguous("q", p.q)
    check_shape("kv_lengths", p.stores[0].lengths, (None,))
    for index, store in enumerate(p.stores):
        _check_store(p, store, "" if index == 0 else "recent_")
        if check_values:
            _check_lengths("kv_lengths" if index == 0 else "recent_lengths", store.lengths)
            check_block_table(store.block_table, store.lengths, store.cache)
    if len(p.stores) == 2 and p.stores[1].cache.kind != "16-bit":
        raise ValueError(f"recent is {p.stores[1].cache.kind}; it must be 16-bit")
    if p.num_queries < 1 or p.q.shape[0] != p.num_sequences * p.num_queries:
        raise ValueError(
            f"q has {p.q.shape[0]} tokens; {p.num_sequences} sequences of {p.num_queries} queries"
            f" have {p.num_sequences * p.num_queries}"
        )
    if not (p.q.shape[1] and first.num_kv_heads) or p.q.shape[1] % first.num_kv_heads:
        raise ValueError(f"{p.q.shape[1]} query heads do not share {first.num_kv_heads} kv heads")
    for name in ("window", "softcap", "scale", "max_kv_length"):
        value = getattr(p, name)
        if value is not None and not value > (-1 if name == "max_kv_length" else 0):
            raise ValueError(f"{name} is {value}; it must be positive")
    if p.window is not None and p.window > MAX_WINDOW:
        raise ValueError(f"window is {p.window}; the most is {MAX_WINDOW}")
    if p.sinks is not None:
        check_shape("sinks", p.sinks, (p.q.shape[1],))
        check_dtype("sinks", p.sinks, (torch.float32, *DTYPES))
        check_last_contiguous("sinks", p.sinks)
    if p.tree_mask is not None:
        _check_tree(p, p.tree_mask)


def _check_store(problem: DecodeProblem, store: CachedTokens, prefix: str) -> None:
    cache, first, q = store.cache, problem.stores[0].cache, problem.q
    check_cache(cache)
    if cache.kind == "16-bit":
        check_dtype(f"{prefix}cache", cache.k, (q.dtype,))
    steps = (*cache.v.stride()[:3], cache.v.storage_offset())
    if cache.kind in ("fp8", "int8") and any(step % 2 for step in steps):
        raise ValueError(f"v has strides and offset {steps}; they must be even, to read by pairs")
    sizes = cache.num_kv_heads, cache.head_dim
    expected = first.num_kv_heads, q.shape[2]
    if sizes != expected:
        raise ValueError(
            f"{prefix}cache has {sizes[0]} kv heads of {sizes[1]} channels; "
            f"expected {expected[0]} of {expected[1]}"
        )
    check_shape(f"{prefix}block_table", store.block_table, (problem.num_sequences, None))
    check_dtype(f"{prefix}block_table", store.block_table, (torch.int32,))
    check_last_contiguous(f"{prefix}block_table", store.block_table)
    name = f"{prefix or 'kv_'}lengths"
    check_shape(name, store.lengths, (problem.num_sequences,))
    check_dtype(name, store.lengths, (torch.int32,))
    check_last_contiguous(name, store.lengths)


def _check_lengths(name: str, lengths: Tensor) -> None:
    if bool((lengths < 0).any()):
        row = int((lengths < 0).int().argmax())
        raise ValueError(f"{name}[{row}] is {int(lengths[row])}; it must not be negative")


def _check_tree(problem: DecodeProblem, tree_mask: Tensor) -> None:
    p = problem
    check_shape("tree_mask", tree_mask, (p.num_sequences, p.num_queries))
    check_dtype("tree_mask", tree_mask, (torch.int64,))
    if not tree_mask.is_contiguous():
        raise ValueError(f"tree_mask has strides {tree_mask.stride()}; it must be contiguous")
    if p.num_queries > MAX_TREE_QUERIES:
        raise ValueError(f"a tree of {p.num_queries} tokens; the most is {MAX_TREE_QUERIES}")
    if p.window is not None and p.window < p.num_queries:
        raise ValueError(
            f"window is {p.window} and the tree has {p.num_queries} tokens; a window that may cut "
            "a tree is not supported"
        )
