"""kv_cache_write: kinds of cache, head dimensions, rotated whole, in part or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from aot.case import Case, meta
from llmopt_kernels.kv_cache_write import WriteProblem, launch_kv_cache_write
from llmopt_kernels.paged_kv import Kind, new_cache

TOKENS = 64
ROTATIONS = [(64, 64), (80, 80), (96, 96), (128, 128), (128, 32), (128, 0), (192, 64), (256, 256)]
KINDS: tuple[Kind, ...] = ("16-bit", "fp8", "int8")


def cases() -> Iterator[Case]:
    """Every kind with heads of 128; the widest kernel, int8, at every head dimension."""
    for kind in KINDS:
        for head_dim, rotary_dim in ROTATIONS:
            if kind == "int8" or head_dim == 128:
                yield case(kind, head_dim, rotary_dim, torch.bfloat16)
    yield case("16-bit", 128, 128, torch.float16)


def case(kind: Kind, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> Case:
    """32 query heads on 8 of the cache."""
    options = {}
    if rotary_dim:
        table = meta(4096, rotary_dim // 2, dtype=torch.float32)
        positions = meta(TOKENS, dtype=torch.int32)
        options = {"positions": positions, "cos": table, "sin": table}
        options["q"] = meta(TOKENS, 32, head_dim, dtype=dtype)
    problem = WriteProblem(
        meta(TOKENS, 8, head_dim, dtype=dtype),
        meta(TOKENS, 8, head_dim, dtype=dtype),
        meta(TOKENS, dtype=torch.int64),
        new_cache(kind, 64, 16, 8, head_dim, dtype=dtype, device="meta"),
        **options,
    )
    return Case(
        f"kv_cache_write {kind} head {head_dim} rotated {rotary_dim} {dtype}",
        partial(launch_kv_cache_write, problem),
        tensor_cores=False,
        archs=(90,) if kind == "fp8" else (80, 90),
    )
