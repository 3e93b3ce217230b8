"""silu_mul_quantize: outputs, activations, rows read once and twice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from aot.case import Case, meta
from llmopt_kernels.silu_mul_quantize import Activation, launch_silu_mul_quantize

FP8 = torch.float8_e4m3fn
TOKENS = 256


def cases() -> Iterator[Case]:
    """A row split, one that a program has whole, one that it reads twice, and an odd one."""
    for dtype in (torch.bfloat16, torch.float16):
        yield case(14336, dtype)
    yield case(14336, FP8, static=True)
    for n in (8192, 14336, 1025):
        yield case(n, torch.int8)
    for n in (8192, 14336):
        yield case(n, FP8)
    yield case(14336, torch.bfloat16, "gelu_tanh")
    yield case(14336, torch.int8, "gelu_tanh")


def case(
    n: int, dtype: torch.dtype, activation: Activation = "silu", *, static: bool = False
) -> Case:
    """Rows of bfloat16, or of float16 where that comes out."""
    x_dtype = dtype if dtype == torch.float16 else torch.bfloat16
    return Case(
        f"silu_mul_quantize {n} {dtype} {activation}{' static' * static}",
        partial(
            launch_silu_mul_quantize,
            meta(TOKENS, 2 * n, dtype=x_dtype),
            activation=activation,
            dtype=dtype,
            scale=meta(1, dtype=torch.float32) if static else None,
        ),
        tensor_cores=False,
        archs=(90,) if dtype == FP8 else (80, 90),
    )
