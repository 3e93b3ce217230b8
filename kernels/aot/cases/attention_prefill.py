"""attention_prefill: head dimensions, element types, options, kinds of cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from aot.case import Case, meta
from llmopt_kernels.attention_prefill import candidate_configs, launch_attention_prefill
from llmopt_kernels.decode_problem import CachedTokens
from llmopt_kernels.paged_kv import HEAD_DIMS, Kind, new_cache
from llmopt_kernels.prefill_problem import PackedTokens, PrefillProblem

TOKENS = 8192
SEQUENCES = 4


def cases() -> Iterator[Case]:
    """Causal attention at every head dimension; the rest where models have it."""
    for head_dim in HEAD_DIMS:
        yield _case(f"head {head_dim} causal", _packed(head_dim))
    yield _case("head 128 causal float16", _packed(128, torch.float16))
    yield _case("head 128 full lse", _packed(128, causal=False), return_lse=True)
    sinks = meta(32)
    yield _case("head 64 window sinks (gpt-oss)", _packed(64, window=128, sinks=sinks))
    yield _case("head 256 window cap (Gemma 2)", _packed(256, window=4096, softcap=50.0))
    yield _case("head 128 chunk of 64", _packed(128, max_seqlen_q=64))
    for head_dim in (64, 128, 256):
        yield _case(f"head {head_dim} paged", _paged("16-bit", head_dim))
    yield _case("head 128 window sinks", _packed(128, window=4096, sinks=sinks))
    yield _case("head 256 paged int8", _paged("int8", 256))
    for kind in ("int8", "int4"):
        yield _case(f"head 128 paged {kind}", _paged(kind, 128))
    yield _case("head 128 paged fp8", _paged("fp8", 128), archs=(90,))
    for head_dim in (64, 128, 256):
        for config in candidate_configs(head_dim):
            yield _case(
                f"head {head_dim} {config}", _packed(head_dim), False, config=config, archs=(90,)
            )


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
    head_dim: int, dtype: torch.dtype = torch.bfloat16, max_seqlen_q: int = 4096, **options: Any
) -> PrefillProblem:
    q, k, v = (meta(TOKENS, heads, head_dim, dtype=dtype) for heads in (32, 8, 8))
    bounds = meta(SEQUENCES + 1, dtype=torch.int32)
    return PrefillProblem(q, PackedTokens(k, v, bounds), bounds, max_seqlen_q, **options)


def _paged(kind: Kind, head_dim: int) -> PrefillProblem:
    cache = new_cache(kind, 4096, 16, 8, head_dim, device="meta")
    table, lengths = meta(SEQUENCES, 512, dtype=torch.int32), meta(SEQUENCES, dtype=torch.int32)
    bounds = meta(SEQUENCES + 1, dtype=torch.int32)
    q = meta(TOKENS, 32, head_dim)
    return PrefillProblem(q, CachedTokens(cache, table, lengths), bounds, 2048)
