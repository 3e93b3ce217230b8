"""norm_quantize: hidden sizes, outputs, with and without a residual."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from aot.case import Case, meta
from llmopt_kernels.norm_quantize import launch_norm_quantize

FP8 = torch.float8_e4m3fn
TOKENS = 256


def cases() -> Iterator[Case]:
    """Each output with a residual; the widest row, an odd one and heads of 128."""
    for dtype in (torch.bfloat16, torch.float16, torch.int8, FP8):
        yield case(4096, dtype, residual=True)
    yield case(4096, FP8, residual=True, static=True)
    yield case(128, torch.bfloat16)
    yield case(2881, torch.int8)
    yield case(16384, torch.int8, residual=True)


def case(hidden: int, dtype: torch.dtype, *, residual: bool = False, static: bool = False) -> Case:
    """Rows of bfloat16, or of float16 where that comes out."""
    x_dtype = dtype if dtype == torch.float16 else torch.bfloat16
    options = " residual" * residual + " static" * static
    return Case(
        f"norm_quantize {hidden} {dtype}{options}",
        partial(
            launch_norm_quantize,
            meta(TOKENS, hidden, dtype=x_dtype),
            meta(hidden, dtype=x_dtype),
            residual=meta(TOKENS, hidden, dtype=x_dtype) if residual else None,
            dtype=dtype,
            scale=meta(1, dtype=torch.float32) if static else None,
        ),
        tensor_cores=False,
        archs=(90,) if dtype == FP8 else (80, 90),
    )
