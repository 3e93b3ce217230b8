"""kv_cache_write: the keys and values of a prompt into pages, the queries rotated with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Make, Prepared, Scale
from benchmarks.suite._inputs import Draw, Inputs
from llmopt_kernels.kv_cache_write import (
    WriteProblem,
    kv_cache_write,
    kv_cache_write_reference,
)
from llmopt_kernels.paged_kv import Kind, PagedKV, dequantize_pages, new_cache

TOKENS = {"real": (8192, 64), "tiny": (5,)}
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
KINDS: tuple[tuple[Kind, int, int], ...] = (("16-bit", 2, 0), ("fp8", 1, 0), ("int8", 1, 4))
"""Of a cache: its kind, bytes an element, bytes of scale a token and head."""


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """32 query and 8 KV heads of 128 channels, bfloat16, pages of 16."""
    for tokens in TOKENS[scale]:
        for kind, element, scale_bytes in KINDS:
            kv = 2 * tokens * KV_HEADS
            elements = kv * HEAD_DIM
            queries = tokens * HEADS * HEAD_DIM
            peers: dict[str, Make] = {"torch eager": _eager} if kind == "16-bit" else {}
            yield Benchmark(
                "kv_cache_write",
                f"{kind}, {tokens} tokens",
                unit="GB/s",
                ceiling="copy",
                num_bytes=(2 + element) * elements
                + kv * scale_bytes
                + 4 * queries
                + tokens * (4 + 8 + 4 * HEAD_DIM),
                num_flops=3 * (queries + elements),
                build=partial(_build, tokens, kind),
                ours=_ours,
                expected=_expected,
                tolerance=8e-3,  # queries are rounded to bfloat16; codes differ on ties alone
                part=_values,
                peers=peers,
                priority=2,
            )


def _build(tokens: int, kind: Kind, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    num_pages = tokens // PAGE_SIZE + 3
    angles = draw.uniform(8192, HEAD_DIM // 2, high=6.28)
    cache = new_cache(kind, num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM, device=device)
    if kind == "fp8":
        cache = replace(
            cache,
            k_scale=draw.uniform(KV_HEADS, low=0.01, high=0.02),
            v_scale=draw.uniform(KV_HEADS, low=0.01, high=0.02),
        )
    return Inputs(
        k=draw.normal(tokens, KV_HEADS, HEAD_DIM),
        v=draw.normal(tokens, KV_HEADS, HEAD_DIM),
        q=draw.normal(tokens, HEADS, HEAD_DIM),
        slots=draw.permutation(num_pages * PAGE_SIZE)[:tokens].long(),
        positions=draw.integers(tokens, high=8192),
        cos=angles.cos(),
        sin=angles.sin(),
        cache=cache,
    )


def _own(i: Inputs) -> tuple[PagedKV, Tensor]:
    """A cache and queries that may change."""
    parts = {name: t.clone() for name, t in i.cache.tensors().items() if t is not None}
    return PagedKV(**parts), i.q.clone()


def _ours(i: Inputs) -> Prepared:
    cache, q = _own(i)

    def call() -> tuple[PagedKV, Tensor]:
        kv_cache_write(i.k, i.v, i.slots, cache, q=q, positions=i.positions, cos=i.cos, sin=i.sin)
        return cache, q

    return Prepared(call)


def _expected(i: Inputs) -> Tensor:
    cache, q = _own(i)
    kv_cache_write_reference(WriteProblem(i.k, i.v, i.slots, cache, q, i.positions, i.cos, i.sin))
    return _values((cache, q)).double()


def _values(output: tuple[PagedKV, Tensor]) -> Tensor:
    """Everything that was written, as one vector of float32."""
    cache, q = output
    pages = torch.arange(cache.num_pages, device=q.device)
    k, v = dequantize_pages(cache, pages, torch.float32)
    return torch.cat([k.flatten(), v.flatten(), q.float().flatten()])


def _eager(i: Inputs) -> Prepared:
    cache, q = _own(i)
    page, offset = i.slots // PAGE_SIZE, i.slots % PAGE_SIZE

    def rotated(x: Tensor) -> Tensor:
        c, s = i.cos[i.positions][:, None].to(x.dtype), i.sin[i.positions][:, None].to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    def call() -> tuple[PagedKV, Tensor]:
        cache.k[page, offset] = rotated(i.k)
        cache.v[page, offset] = i.v
        return cache, rotated(q)

    return Prepared(call)
