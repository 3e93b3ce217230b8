"""kv_page_quantize, by head dimension, page size and element type."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from aot.case import Case, meta
from llmopt_kernels.kv_page_quantize import launch_kv_page_quantize
from llmopt_kernels.paged_kv import new_cache

SHAPES = [(80, 128), (128, 128), (256, 32), (128, 16)]


def cases() -> Iterator[Case]:
    """Head dimensions at the widest page, which needs most registers, and shorter pages."""
    for head_dim, page_size in SHAPES:
        yield case(head_dim, page_size, torch.bfloat16)
    yield case(64, 64, torch.float16)


def case(head_dim: int, page_size: int, dtype: torch.dtype) -> Case:
    """8 KV heads."""
    pool = (64, page_size, 8, head_dim)
    return Case(
        f"kv_page_quantize head {head_dim} page {page_size} {dtype}",
        partial(
            launch_kv_page_quantize,
            new_cache("16-bit", *pool, dtype=dtype, device="meta"),
            meta(16, dtype=torch.int32),
            new_cache("int4", *pool, device="meta"),
            meta(16, dtype=torch.int32),
        ),
        tensor_cores=False,
    )
