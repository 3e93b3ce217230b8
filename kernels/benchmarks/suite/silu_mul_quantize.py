"""silu_mul_quantize: a gated activation and its quantization, of a prompt and of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.benchmark import Benchmark, Make, Prepared, Scale
from benchmarks.suite._inputs import Draw, Inputs
from benchmarks.suite._quantized import (
    KINDS,
    TOKENS,
    TOLERANCE,
    options,
    output_bytes,
    values,
)
from llmopt_kernels.silu_mul_quantize import silu_mul_quantize, silu_mul_quantize_reference

COLUMNS = {"real": 14336, "tiny": 200}


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Bfloat16 rows of twice 14336 channels, as of Llama 3.1 8B."""
    columns = COLUMNS[scale]
    for tokens in TOKENS[scale]:
        for kind, dtype, is_static in KINDS:
            reference = partial(silu_mul_quantize_reference, compute=torch.float64)
            eager: Make = partial(
                _bind, partial(silu_mul_quantize_reference, compute=torch.float32), dtype, is_static
            )
            yield Benchmark(
                "silu_mul_quantize",
                f"{kind}, {tokens} x {columns}",
                unit="GB/s",
                ceiling="copy",
                num_bytes=2 * 2 * tokens * columns
                + output_bytes(tokens, columns, dtype, is_static),
                num_flops=6 * tokens * columns,
                build=partial(_build, tokens, columns),
                ours=partial(_bind, silu_mul_quantize, dtype, is_static),
                expected=partial(_expected, reference, dtype, is_static),
                tolerance=TOLERANCE,
                part=values,
                peers={"torch eager": _silu if dtype == torch.bfloat16 else eager},
                priority=2,
            )


def _build(tokens: int, columns: int, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    return Inputs(
        gate_up=draw.normal(tokens, 2 * columns), scale=torch.tensor([0.02], device=device)
    )


def _bind(function: Any, dtype: torch.dtype, is_static: bool, i: Inputs) -> Prepared:
    return Prepared(lambda: function(i.gate_up, **options(dtype, is_static, i)))


def _silu(i: Inputs) -> Prepared:
    gate, up = i.gate_up.chunk(2, -1)
    return Prepared(lambda: (silu(gate) * up, None))


def _expected(reference: Any, dtype: torch.dtype, is_static: bool, i: Inputs) -> Tensor:
    return values(_bind(reference, dtype, is_static, i).call()).double()
