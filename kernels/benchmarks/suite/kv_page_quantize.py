"""kv_page_quantize: full pages of a 16-bit cache to int4, a batch's tokens of one page size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Prepared, Scale
from benchmarks.suite._inputs import Draw, Inputs
from llmopt_kernels.kv_page_quantize import kv_page_quantize, kv_page_quantize_reference
from llmopt_kernels.paged_kv import PagedKV, dequantize_pages, new_cache

PAGES = {"real": (512, 16), "tiny": (3,)}
PAGE_SIZE, KV_HEADS, HEAD_DIM = 64, 8, 128


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Pages of 64 tokens, 8 KV heads of 128 channels, bfloat16."""
    for pages in PAGES[scale]:
        elements = 2 * pages * PAGE_SIZE * KV_HEADS * HEAD_DIM
        scales = pages * KV_HEADS * (HEAD_DIM + PAGE_SIZE)
        yield Benchmark(
            "kv_page_quantize",
            f"{pages} pages",
            unit="GB/s",
            ceiling="copy",
            num_bytes=elements * 5 // 2 + 8 * scales + 8 * pages,
            num_flops=4 * elements,
            build=partial(_build, pages),
            ours=partial(_bind, torch.float32, True),
            expected=lambda i: _values(_bind(torch.float64, False, i).call()),
            # bfloat16 values often lie on the edge between two codes: either is right.
            tolerance=1e-2,
            part=_values,
            peers={"torch eager": partial(_bind, torch.float32, False)},
            priority=2,
        )


def _build(pages: int, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    shape = (pages + 2, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    return Inputs(
        source=PagedKV(draw.normal(*shape), draw.normal(*shape)),
        source_pages=draw.permutation(pages + 2)[:pages],
        pages=draw.permutation(pages + 2)[:pages],
        cache=new_cache("int4", *shape, device=device),
    )


def _bind(dtype: torch.dtype, ours: bool, i: Inputs) -> Prepared:
    parts = {name: t.clone() for name, t in i.cache.tensors().items() if t is not None}
    cache = PagedKV(**parts)

    def call() -> PagedKV:
        if ours:
            kv_page_quantize(i.source, i.source_pages, cache, i.pages)
        else:
            kv_page_quantize_reference(i.source, i.source_pages, cache, i.pages, dtype=dtype)
        return cache

    # The reference picks pages by a mask, which waits for the device.
    return Prepared(call, capture=ours)


def _values(cache: PagedKV) -> Tensor:
    """What the codes mean, as one vector of float32."""
    pages = torch.arange(cache.num_pages, device=cache.k.device)
    return torch.cat([x.flatten() for x in dequantize_pages(cache, pages, torch.float32)])
