"""attention_prefill: prompts of one and of several lengths, and chunks behind a paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Make, Prepared, Scale, Tunable
from benchmarks.goals import PREFILL, SDPA_CUDNN, SDPA_EFFICIENT, SDPA_FLASH
from benchmarks.peers import SDPA_MATH, flex, sdpa
from benchmarks.suite._inputs import Draw, Inputs, chip_here
from llmopt_kernels.attention_prefill import (
    PrefillConfig,
    attention_prefill,
    attention_prefill_paged,
    attention_prefill_reference,
    candidate_configs,
    launch_attention_prefill,
    shipped_config,
)
from llmopt_kernels.decode_problem import CachedTokens
from llmopt_kernels.paged_kv import Kind, PagedKV, gather
from llmopt_kernels.prefill_problem import PackedTokens, PrefillProblem

FLEX = "FlexAttention"
EVERY = (SDPA_FLASH, SDPA_CUDNN, SDPA_EFFICIENT, FLEX)
PAGE_SIZE = 64


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences of ``lengths`` query tokens, each behind ``cached`` tokens in pages."""

    name: str
    lengths: tuple[int, ...]
    head_dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    cached: int = 0
    kind: Kind = "16-bit"
    peers: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Of the operation."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap}

    @property
    def num_pairs(self) -> int:
        """Of a query and a key that it sees, in one head."""
        if not self.causal:
            return sum(n * (n + self.cached) for n in self.lengths)
        seen = (self.cached + i + 1 for n in self.lengths for i in range(n))
        return sum(min(n, self.window or n) for n in seen)

    @property
    def num_bytes(self) -> int:
        """Queries, outputs, keys and values."""
        queries = sum(self.lengths)
        keys = queries + self.cached * len(self.lengths)
        element = 2 if self.kind == "16-bit" else 1
        kv = 2 * keys * self.kv_heads * (self.head_dim * element + (self.kind == "int8") * 4)
        return 4 * queries * self.heads * self.head_dim + kv


CASES = {
    "real": (
        Case(PREFILL[1], (8192,), peers=EVERY),
        Case("causal head 64, 8192 tokens", (8192,), 64, peers=EVERY[:2]),
        Case("causal head 80, 4096 tokens", (4096,), 80, kv_heads=32, peers=EVERY[:2]),
        Case("causal head 96, 4096 tokens", (4096,), 96, kv_heads=32, peers=EVERY[:2]),
        Case("causal head 192, 4096 tokens", (4096,), 192, kv_heads=32, peers=EVERY[:2]),
        Case("causal head 256, 8192 tokens", (8192,), 256, 16, 8, peers=EVERY[:2]),
        Case("causal head 128, 1024 tokens", (1024,), peers=EVERY[:2]),
        Case("full head 128, 8192 tokens", (8192,), causal=False, peers=EVERY[:2]),
        Case("window 1024, 16384 tokens", (16384,), window=1024, peers=(FLEX,)),
        Case("soft cap, head 256, 8192 tokens", (8192,), 256, 16, 8, softcap=50.0, peers=(FLEX,)),
        Case("packed, 512 to 4096 tokens", (512, 4096, 1536, 3072, 1024, 2048), peers=(FLEX,)),
        Case("4 x 512 tokens behind 16384", (512,) * 4, cached=16384, peers=(FLEX,)),
        Case("4 x 512 tokens behind 16384, int8", (512,) * 4, cached=16384, kind="int8"),
    ),
    "tiny": (
        Case("causal", (33,), 64, 4, 2, peers=(*EVERY, SDPA_MATH)),
        Case("full", (33,), 64, 4, 2, causal=False, peers=(SDPA_FLASH, SDPA_MATH)),
        Case("window", (33,), 64, 4, 2, window=9, peers=(FLEX,)),
        Case("soft cap", (33,), 64, 4, 2, softcap=5.0, peers=(FLEX,)),
        Case("packed", (5, 17, 1), 64, 4, 2, peers=(FLEX,)),
        Case("cached", (5, 5), 64, 4, 2, cached=100, peers=(FLEX,)),
        Case("cached, int8", (5, 5), 64, 4, 2, cached=100, kind="int8"),
    ),
}


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Bfloat16, 32 query and 8 KV heads, unless the name says otherwise."""
    for case in CASES[scale]:
        yield Benchmark(
            "attention_prefill",
            case.name,
            unit="TFLOP/s",
            ceiling="bf16",
            num_bytes=case.num_bytes,
            num_flops=4 * case.num_pairs * case.heads * case.head_dim,
            build=partial(_build, case),
            ours=partial(_ours, case),
            expected=partial(_expected, case),
            # Probabilities are rounded to bfloat16 before the second product, then the output.
            tolerance=8e-3,
            part=_rows,
            peers={name: _peer(case, name) for name in case.peers},
            tunable=Tunable(
                candidate_configs(case.head_dim),
                shipped_config(
                    case.head_dim, max(case.lengths), case.kind, chip_here(), case.window
                ),
                partial(_with_config, case),
            ),
            priority=0 if case.name == PREFILL[1] else 1,
            estimated_s=18.0 if FLEX in case.peers else 4.0,
        )


def _build(case: Case, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    queries, sequences = sum(case.lengths), len(case.lengths)
    inputs = Inputs(
        q=draw.normal(queries, case.heads, case.head_dim),
        starts=torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=device),
    )
    if not case.cached:
        inputs.k = draw.normal(queries, case.kv_heads, case.head_dim)
        inputs.v = draw.normal(queries, case.kv_heads, case.head_dim)
        return inputs
    tokens = case.cached + max(case.lengths)
    pages = -(-tokens // PAGE_SIZE)
    shape = (sequences * pages, PAGE_SIZE, case.kv_heads)
    inputs.cache = _random_cache(case, shape, draw)
    inputs.table = draw.permutation(shape[0]).view(sequences, pages)
    lengths = [case.cached + n for n in case.lengths]
    inputs.kv_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return inputs


def _random_cache(case: Case, shape: tuple[int, int, int], draw: Draw) -> PagedKV:
    if case.kind == "16-bit":
        return PagedKV(*(draw.normal(*shape, case.head_dim) for _ in "kv"))
    codes = (draw.integers(*shape, case.head_dim, high=255, dtype=torch.uint8) for _ in "kv")
    scales = (draw.uniform(*shape, low=1 / 80, high=1 / 60) for _ in "kv")
    return PagedKV(*((c - 127).view(torch.int8) for c in codes), *scales)


def _ours(case: Case, i: Inputs) -> Prepared:
    longest, options = max(case.lengths), case.options
    if case.cached:
        paged = (i.q, i.cache, i.table, i.starts, i.kv_lengths, longest)
        return Prepared(lambda: attention_prefill_paged(*paged, **options))
    packed = (i.q, i.k, i.v, i.starts, i.starts, longest)
    return Prepared(lambda: attention_prefill(*packed, **options))


def _with_config(case: Case, i: Inputs, config: PrefillConfig) -> Prepared:
    kv: PackedTokens | CachedTokens
    if case.cached:
        kv = CachedTokens(i.cache, i.table, i.kv_lengths)
    else:
        kv = PackedTokens(i.k, i.v, i.starts)
    problem = PrefillProblem(i.q, kv, i.starts, max(case.lengths), **case.options)
    return Prepared(lambda: launch_attention_prefill(problem, config=config)[0])


def _expected(case: Case, i: Inputs) -> Tensor:
    """A head at a time: the scores of all would not fit in memory."""
    k, v, starts = _keys_and_values(case, i)
    group = case.heads // case.kv_heads
    heads = []
    for head in range(case.heads):
        kv = slice(head // group, head // group + 1)
        problem = PrefillProblem(
            i.q[:, head : head + 1],
            PackedTokens(k[:, kv], v[:, kv], starts),
            i.starts,
            max(case.lengths),
            **case.options,
        )
        heads.append(attention_prefill_reference(problem)[0])
    return torch.cat(heads, 1)


def _keys_and_values(case: Case, i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Packed, and where the sequences start."""
    if not case.cached:
        return i.k, i.v, i.starts
    lengths = i.kv_lengths.tolist()
    rows = zip(i.table, lengths, strict=True)
    pairs = [gather(i.cache, row, n, torch.float64) for row, n in rows]
    k, v = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return k, v, torch.tensor([0, *accumulate(lengths)])


def _rows(output: Tensor) -> Tensor:
    """Of ``(tokens, heads, head_dim)``, or of a peer's ``(sequences, heads, tokens, head_dim)``."""
    return output.transpose(1, 2).flatten(0, 1) if output.dim() == 4 else output


def _peer(case: Case, name: str) -> Make:
    if name == FLEX:
        return partial(_flex, case)
    return lambda i: sdpa(name, *_by_head(case, i), causal=case.causal)


def _by_head(case: Case, i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``(sequences, heads, tokens, head_dim)``; packed sequences as one."""
    if not case.cached:
        q, k, v = (x.transpose(0, 1)[None] for x in (i.q, i.k, i.v))
        return q, k, v
    q = i.q.view(len(case.lengths), -1, case.heads, case.head_dim)
    pools = (pool[i.table.long()].flatten(1, 2) for pool in (i.cache.k, i.cache.v))
    tokens = case.cached + case.lengths[0]
    k, v = (x[:, :tokens].transpose(1, 2).contiguous() for x in pools)
    return q.transpose(1, 2), k, v


def _flex(case: Case, i: Inputs) -> Prepared:
    sequence = torch.repeat_interleave(
        torch.arange(len(case.lengths), device=i.q.device), i.starts.diff().long()
    )

    # Plain numbers: what the compiler sees of these functions' surroundings stays simple.
    cached, window, cap = case.cached, case.window or 0, case.softcap or 0.0

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + cached >= key

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    def in_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (sequence[query] == sequence[key])

    def capped(s: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(s / cap)

    packed = len(case.lengths) > 1 and not case.cached
    mask_mod = in_window if window else in_sequence if packed else causal
    score_mod = capped if cap else None
    return flex(*_by_head(case, i), mask_mod=mask_mod, score_mod=score_mod)
