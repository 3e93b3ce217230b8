"""attention_decode: one new token of each of many sequences, a long one, a tree of drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Make, Prepared, Scale, Tunable
from benchmarks.goals import DECODE_CASES, SDPA_CUDNN, SDPA_EFFICIENT, SDPA_FLASH
from benchmarks.peers import SDPA_MATH, flex, sdpa
from benchmarks.suite._inputs import Draw, Inputs, chip_here
from llmopt_kernels.attention_decode import (
    attention_decode,
    attention_decode_reference,
    launch_attention_decode,
)
from llmopt_kernels.attention_decode_config import DecodeConfig, candidate_configs, shipped_config
from llmopt_kernels.decode_problem import CachedTokens, DecodeProblem, pack_tree_mask
from llmopt_kernels.paged_kv import Kind, PagedKV, new_cache

KINDS: dict[str, Kind] = {"bf16": "16-bit", "fp8": "fp8", "int8": "int8", "int4": "int4"}
ELEMENT_BITS: dict[Kind, int] = {"16-bit": 16, "fp8": 8, "int8": 8, "int4": 4}
FLEX = "FlexAttention"


@dataclass(frozen=True, slots=True)
class Case:
    """A batch; ``ending`` tells it apart from the like-named. Lengths fall evenly if ``uneven``."""

    elements: str
    sequences: int
    tokens: int
    ending: str = ""
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    num_queries: int = 1
    uneven: bool = False
    window: int | None = None

    @property
    def name(self) -> str:
        """Of the problem."""
        return f"{self.elements}, {self.sequences} x {self.tokens} tokens{self.ending}"

    @property
    def kind(self) -> Kind:
        """Of the cache."""
        return KINDS[self.elements]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if not self.uneven:
            return [self.tokens] * self.sequences
        return [max(1, self.tokens * (i + 1) // self.sequences) for i in range(self.sequences)]

    @property
    def num_seen(self) -> int:
        """Tokens of the cache that are read."""
        return sum(min(n, self.window or n) for n in self.lengths)

    @property
    def num_bytes(self) -> int:
        """Codes, scales, queries and outputs."""
        token = 2 * self.kv_heads * self.head_dim * ELEMENT_BITS[self.kind] / 8
        if self.kind == "int8":
            token += 2 * 4 * self.kv_heads
        if self.kind == "int4":
            token += 2 * 4 * self.kv_heads * (1 + self.head_dim / self.page_size)
        rows = self.sequences * self.num_queries * self.heads * self.head_dim
        return int(self.num_seen * token) + 2 * 2 * rows

    @property
    def block_m(self) -> int:
        """Rows of a program, as the launcher has them."""
        rows = self.num_queries * self.heads // self.kv_heads
        return min(64, max(16, 1 << (rows - 1).bit_length()))


CASES = {
    "real": (
        *(Case(elements, 64, 8192) for elements in KINDS),
        Case("bf16", 64, 8192, ", pages of 16", page_size=16),
        Case("int8", 64, 8192, ", pages of 16", page_size=16),
        Case("bf16", 64, 8192, ", uneven", uneven=True),
        Case("bf16", 64, 8192, ", head 64", head_dim=64),
        Case("bf16", 64, 8192, ", head 256", head_dim=256, heads=16, kv_heads=4),
        Case("bf16", 64, 8192, ", window 1024", window=1024),
        Case("bf16", 64, 1024),
        Case("bf16", 1, 131072),
        Case("int8", 1, 131072),
        Case("bf16", 16, 8192, ", tree of 16", num_queries=16),
    ),
    "tiny": (
        *(Case(e, 2, 40, heads=4, kv_heads=2, head_dim=64, page_size=16) for e in KINDS),
        Case("bf16", 3, 40, ", uneven", 4, 2, 64, 16, uneven=True),
        Case("bf16", 2, 40, ", window 9", 4, 2, 64, 16, window=9),
        Case("bf16", 2, 40, ", tree of 4", 4, 2, 64, 16, num_queries=4),
    ),
}


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """32 query and 8 KV heads of 128 channels, pages of 64, unless the name says otherwise."""
    for case in CASES[scale]:
        yield Benchmark(
            "attention_decode",
            case.name,
            unit="GB/s",
            ceiling="copy",
            num_bytes=case.num_bytes,
            num_flops=4 * case.num_seen * case.num_queries * case.heads * case.head_dim,
            build=partial(_build, case),
            ours=partial(_ours, case),
            expected=lambda i: attention_decode_reference(i.problem)[0],
            # Probabilities are rounded to bfloat16 before the second product, then the output.
            tolerance=8e-3,
            part=_rows,
            peers=_peers(case),
            tunable=Tunable(
                list(candidate_configs(case.kind, case.head_dim, case.page_size, case.block_m)),
                shipped_config(case.kind, case.head_dim, case.page_size, case.block_m, chip_here()),
                _with_config,
            ),
            priority=0 if case.name in DECODE_CASES.values() else 1,
            estimated_s=18.0 if FLEX in _peers(case) else 5.0,
        )


def _build(case: Case, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    pages = -(-case.tokens // case.page_size)
    cache = _random_cache(case, case.sequences * pages, draw)
    q = draw.normal(case.sequences * case.num_queries, case.heads, case.head_dim)
    table = draw.permutation(cache.num_pages).view(case.sequences, pages)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    tree = None
    if case.num_queries > 1:  # a binary tree: the parent of token i is (i - 1) // 2
        parents = [(i - 1) // 2 if i else -1 for i in range(case.num_queries)]
        mask = pack_tree_mask(_ancestors(parents)).to(device)
        tree = mask.expand(case.sequences, -1).contiguous()
    problem = DecodeProblem(
        q,
        (CachedTokens(cache, table, lengths),),
        case.num_queries,
        case.tokens,
        case.head_dim**-0.5,
        tree,
        case.window,
        None,
        None,
    )
    return Inputs(problem=problem, q=q, cache=cache, table=table, lengths=lengths, tree=tree)


def _random_cache(case: Case, num_pages: int, draw: Draw) -> PagedKV:
    """Keys and values of about unit deviation."""
    shape = (num_pages, case.page_size, case.kv_heads, case.head_dim)
    if case.kind == "16-bit":
        return PagedKV(draw.normal(*shape), draw.normal(*shape))
    empty = new_cache(case.kind, *shape, device=draw.device)
    if case.kind == "fp8":
        codes = [draw.normal(*shape, dtype=torch.float8_e4m3fn, scale=64.0) for _ in range(2)]
        scales = [draw.uniform(case.kv_heads, low=1 / 80, high=1 / 50) for _ in range(2)]
        return PagedKV(*codes, *scales)
    high = 255 if case.kind == "int8" else 256
    codes = [draw.integers(*empty.k.shape, high=high, dtype=torch.uint8) for _ in range(2)]
    if case.kind == "int8":  # -127 .. 127, in two's complement
        codes = [(c - 127).view(torch.int8) for c in codes]
    steps = (1 / 80, 1 / 60) if case.kind == "int8" else (0.2, 0.25)

    def scale_like(t: Tensor | None) -> Tensor:
        assert t is not None
        return draw.uniform(*t.shape, low=steps[0], high=steps[1])

    scales = [scale_like(empty.k_scale), scale_like(empty.v_scale)]
    if case.kind == "int8":
        return PagedKV(*codes, *scales)
    return PagedKV(*codes, *scales, *(-7.5 * s for s in scales))


def _ancestors(parents: list[int]) -> Tensor:
    """Who sees whom, ``(1, n, n)`` bool, a token itself included."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            seen[token] |= seen[parent]
    return seen[None]


def _ours(case: Case, i: Inputs) -> Prepared:
    return Prepared(
        lambda: attention_decode(
            i.q,
            i.cache,
            i.table,
            i.lengths,
            max_kv_length=case.tokens,
            num_queries=case.num_queries,
            tree_mask=i.tree,
            window=case.window,
        )
    )


def _with_config(i: Inputs, config: DecodeConfig) -> Prepared:
    return Prepared(lambda: launch_attention_decode(i.problem, config=config)[0])


def _rows(output: Tensor) -> Tensor:
    """Of ``(tokens, heads, head_dim)``, or of a peer's ``(sequences, heads, 1, head_dim)``."""
    return output.transpose(1, 2).flatten(0, 1) if output.dim() == 4 else output


def _peers(case: Case) -> dict[str, Make]:
    """Peers take one query a sequence over 16-bit keys that are not paged, all of one length."""
    plain = case.elements == "bf16" and case.num_queries == 1
    if not plain or case.uneven or case.window or case.page_size == 16 and case.head_dim == 128:
        return {}
    names = [SDPA_FLASH, SDPA_CUDNN, SDPA_EFFICIENT]
    peers: dict[str, Make] = {name: partial(_sdpa, name) for name in names}
    if case.tokens < 100:
        return {**peers, SDPA_MATH: partial(_sdpa, SDPA_MATH), FLEX: _flex}
    return {**peers, FLEX: _flex} if case.name in DECODE_CASES.values() else peers


def _contiguous(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(sequences, heads, tokens, head_dim)``, out of their pages."""
    k, v = (pool[i.table.long()].flatten(1, 2).transpose(1, 2) for pool in (i.cache.k, i.cache.v))
    tokens = int(i.lengths[0])
    return i.q[:, :, None], k[:, :, :tokens], v[:, :, :tokens]


def _sdpa(name: str, i: Inputs) -> Prepared:
    return _noted(sdpa(name, *_contiguous(i), causal=False))


def _flex(i: Inputs) -> Prepared:
    return _noted(flex(*_contiguous(i), mask_mod=None))


def _noted(prepared: Prepared) -> Prepared:
    note = "; ".join(filter(None, ("keys and values not paged", prepared.note)))
    return replace(prepared, note=note)
