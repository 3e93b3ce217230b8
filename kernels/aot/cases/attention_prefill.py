"""attention_prefill: head dimensions, element types, options, kinds of cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from aot.case import Case, meta
from benchmarks.suite.attention_prefill import CASES
from llmopt_kernels.attention_prefill import (
    candidate_configs,
    launch_attention_prefill,
    shipped_config,
)
from llmopt_kernels.decode_problem import CachedTokens
from llmopt_kernels.paged_kv import HEAD_DIMS, Kind, new_cache
from llmopt_kernels.prefill_problem import PackedTokens, PrefillProblem

TOKENS = 8192
SEQUENCES = 4
LONG, SHORT = 4096, 64


def cases() -> Iterator[Case]:
    """Every head dimension, packed and paged, long and short; the rest where models have it."""
    for head_dim in HEAD_DIMS:
        for length in (LONG, SHORT):
            yield _case(f"head {head_dim}, {length}", _packed(head_dim, max_seqlen_q=length))
            paged = _paged("16-bit", head_dim, max_seqlen_q=length)
            yield _case(f"head {head_dim}, {length}, paged", paged)
    for head_dim, length in ((80, LONG), (128, LONG), (128, SHORT), (256, SHORT)):
        problem = _packed(head_dim, torch.float16, length)
        yield _case(f"head {head_dim}, {length}, float16", problem)
    yield _case("head 128 full lse", _packed(128, causal=False), return_lse=True)
    sinks = meta(32)
    yield _case("head 64 window sinks (gpt-oss)", _packed(64, window=128, sinks=sinks))
    yield _case("head 128 window sinks", _packed(128, window=4096, sinks=sinks))
    yield _case("head 256 window cap (Gemma 2)", _packed(256, window=4096, softcap=50.0))
    for head_dim in (96, 128, 192, 256):
        yield _case(f"head {head_dim} cap", _packed(head_dim, softcap=50.0))
    compressed: tuple[tuple[Kind, tuple[int, ...]], ...]
    compressed = (("int8", (80, 90)), ("int4", (80, 90)), ("fp8", (90,)))
    for kind, archs in compressed:
        for head_dim, length in ((64, LONG), (128, LONG), (256, LONG), (128, SHORT), (256, SHORT)):
            problem = _paged(kind, head_dim, length)
            yield _case(f"head {head_dim}, {length}, paged {kind}", problem, archs=archs)
    for problem in (_packed(256), _paged("int4", 256, LONG)):
        config = shipped_config(256, LONG, problem.kind, 120)
        yield _case(f"head 256 {problem.kind}, of 12.0", problem, archs=(80,), config=config)
    yield from _candidates()


def _candidates() -> Iterator[Case]:
    """What ``--tune`` tries on compute capability 9.0: any of it may ship."""
    seen = set()
    for tuned in CASES["real"]:
        words = [f"head {tuned.head_dim}"]
        words += [name for name, value in tuned.options.items() if value]
        if tuned.cached:
            problem = _paged(tuned.kind, tuned.head_dim, LONG)
            words.append(f"paged {tuned.kind}")
        else:
            problem = _packed(tuned.head_dim, **tuned.options)
        for config in candidate_configs(tuned.head_dim):
            name = f"{' '.join(words)} {config}"
            if name not in seen:
                yield _case(name, problem, False, config=config, archs=(90,))
            seen.add(name)


def _case(
    name: str,
    problem: PrefillProblem,
    shipped: bool = True,
    archs: tuple[int, ...] = (80, 90),
    **options: Any,
) -> Case:
    return Case(
        f"attention_prefill {name}",
        lambda: launch_attention_prefill(problem, **options),
        tensor_cores=True,
        shipped=shipped,
        archs=archs,
    )


def _packed(
    head_dim: int, dtype: torch.dtype = torch.bfloat16, max_seqlen_q: int = LONG, **options: Any
) -> PrefillProblem:
    q, k, v = (meta(TOKENS, heads, head_dim, dtype=dtype) for heads in (32, 8, 8))
    bounds = meta(SEQUENCES + 1, dtype=torch.int32)
    return PrefillProblem(q, PackedTokens(k, v, bounds), bounds, max_seqlen_q, **options)


def _paged(kind: Kind, head_dim: int, max_seqlen_q: int) -> PrefillProblem:
    cache = new_cache(kind, 4096, 16, 8, head_dim, device="meta")
    table, lengths = meta(SEQUENCES, 512, dtype=torch.int32), meta(SEQUENCES, dtype=torch.int32)
    bounds = meta(SEQUENCES + 1, dtype=torch.int32)
    q = meta(TOKENS, 32, head_dim)
    return PrefillProblem(q, CachedTokens(cache, table, lengths), bounds, max_seqlen_q)
