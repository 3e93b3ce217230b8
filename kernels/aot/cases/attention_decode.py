"""attention_decode, by kind of cache, head dimension and option."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from aot.case import Case, meta
from benchmarks.suite.attention_decode import CASES
from llmopt_kernels.attention_decode import launch_attention_decode
from llmopt_kernels.attention_decode_config import candidate_configs
from llmopt_kernels.decode_problem import CachedTokens, DecodeProblem
from llmopt_kernels.paged_kv import HEAD_DIMS, Kind, new_cache

SEQUENCES, PAGES, PAGE_SIZE, KV_HEADS = 8, 512, 64, 8


def store(kind: Kind, head_dim: int, page_size: int, dtype: torch.dtype) -> CachedTokens:
    """Eight sequences."""
    cache = new_cache(kind, PAGES, page_size, KV_HEADS, head_dim, dtype=dtype, device="meta")
    table = meta(SEQUENCES, 64, dtype=torch.int32)
    return CachedTokens(cache, table, meta(SEQUENCES, dtype=torch.int32))


def launcher(
    kind: Kind,
    head_dim: int,
    *,
    group: int = 4,
    page_size: int = PAGE_SIZE,
    num_queries: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    tree: bool = False,
    sinks: bool = False,
    recent: bool = False,
    config: Any = None,
    **options: Any,
) -> Callable[[], object]:
    """A launch on meta tensors."""
    stores = [store(kind, head_dim, page_size, dtype)]
    if recent:
        stores.append(store("16-bit", head_dim, page_size, dtype))
    problem = DecodeProblem(
        meta(SEQUENCES * num_queries, KV_HEADS * group, head_dim, dtype=dtype),
        tuple(stores),
        num_queries,
        4096,
        head_dim**-0.5,
        meta(SEQUENCES, num_queries, dtype=torch.int64) if tree else None,
        sinks=meta(KV_HEADS * group) if sinks else None,
        **options,
    )
    return lambda: launch_attention_decode(problem, None, config)


def cases() -> Iterator[Case]:
    """Every kind and head dimension; options on 128 channels."""
    kinds: tuple[Kind, ...] = ("16-bit", "fp8", "int8", "int4")
    for kind in kinds:
        archs = (90,) if kind == "fp8" else (80, 90)
        for head_dim in HEAD_DIMS:
            name = f"attention_decode {kind} {head_dim}"
            yield Case(name, launcher(kind, head_dim), True, archs=archs)
        name = f"attention_decode {kind} 128"
        tree = {"num_queries": 64, "tree": True}
        yield Case(f"{name} tree of 64", launcher(kind, 128, **tree), True, archs=archs)
        if kind in ("16-bit", "int4"):
            yield Case(f"{name} pages of 16", launcher(kind, 128, page_size=16), True, archs=archs)
        for head_dim in HEAD_DIMS:
            for num_queries in (8, 16):
                title = f"attention_decode {kind} {head_dim} tree of {num_queries}"
                rows = launcher(kind, head_dim, num_queries=num_queries, tree=True)
                yield Case(title, rows, True, False, archs)
    name = "attention_decode 16-bit"
    yield Case(f"{name} 128 float16", launcher("16-bit", 128, dtype=torch.float16), True)
    yield Case(f"{name} 256 tree of 64", launcher("16-bit", 256, num_queries=64, tree=True), True)
    gpt_oss = {"group": 8, "window": 128, "sinks": True}
    yield Case(f"{name} 64 window, sinks", launcher("16-bit", 64, **gpt_oss), True)
    gemma = {"group": 2, "window": 4096, "softcap": 50.0}
    yield Case(f"{name} 256 window, soft cap", launcher("16-bit", 256, **gemma), True)
    yield Case("attention_decode int4 128 recent", launcher("int4", 128, recent=True), True)
    # What has spilled before.
    chain = {"num_queries": 8}
    yield Case(f"{name} 128 chain of 8", launcher("16-bit", 128, **chain), True)
    yield Case(f"{name} 192 chain of 8", launcher("16-bit", 192, **chain), True)
    capped = {"num_queries": 8, "window": 4096, "softcap": 30.0}
    name = "attention_decode int8"
    yield Case(f"{name} 128 chain of 8, window, cap", launcher("int8", 128, **capped), True)
    yield Case(f"{name} 128 float16", launcher("int8", 128, dtype=torch.float16), True)
    yield Case(f"{name} 256 tree of 64", launcher("int8", 256, num_queries=64, tree=True), True)
    yield Case("attention_decode int4 256 pages of 16", launcher("int4", 256, page_size=16), True)
    yield from _candidates()


def _candidates() -> Iterator[Case]:
    """What ``--tune`` tries: any of it may ship."""
    seen = set()
    for tuned in CASES["real"]:
        kind, shape = tuned.kind, (tuned.head_dim, tuned.page_size, tuned.block_m)
        options = {"num_queries": tuned.num_queries, "tree": tuned.num_queries > 1}
        if tuned.window is not None:
            options["window"] = tuned.window
        for config in candidate_configs(kind, *shape):
            title = (
                f"attention_decode {kind} {tuned.head_dim} pages of {tuned.page_size}"
                f"{f' tree of {tuned.num_queries}' * options['tree']}"
                f"{' window' * ('window' in options)}"
                f" {config.block_n}x{config.num_warps}x{config.num_stages}"
            )
            if title in seen:
                continue
            seen.add(title)
            call = launcher(
                kind, tuned.head_dim, page_size=tuned.page_size, config=config, **options
            )
            yield Case(title, call, True, False, (90,) if kind == "fp8" else (80, 90))
