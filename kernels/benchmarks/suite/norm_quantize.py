"""norm_quantize: residual addition, RMSNorm and quantization, of a prompt and of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

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
from llmopt_kernels.norm_quantize import norm_quantize, norm_quantize_reference

HIDDEN = {"real": 4096, "tiny": 200}
EPS = 1e-6


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Bfloat16 rows of 4096 channels, with a residual."""
    hidden = HIDDEN[scale]
    for tokens in TOKENS[scale]:
        for kind, dtype, is_static in KINDS:
            reference = partial(
                _bind, partial(norm_quantize_reference, compute=torch.float64), dtype, is_static
            )
            eager: Make = partial(
                _bind, partial(norm_quantize_reference, compute=torch.float32), dtype, is_static
            )
            yield Benchmark(
                "norm_quantize",
                f"{kind}, {tokens} x {hidden}",
                unit="GB/s",
                ceiling="copy",
                num_bytes=3 * 2 * tokens * hidden
                + 2 * hidden
                + output_bytes(tokens, hidden, dtype, is_static),
                num_flops=6 * tokens * hidden,
                build=partial(_build, tokens, hidden),
                ours=partial(_bind, norm_quantize, dtype, is_static),
                expected=partial(_expected, reference),
                tolerance=TOLERANCE,
                part=_values,
                peers={"torch eager": _rms_norm if dtype == torch.bfloat16 else eager},
                priority=2,
            )


def _build(tokens: int, hidden: int, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    return Inputs(
        x=draw.normal(tokens, hidden),
        residual=draw.normal(tokens, hidden),
        weight=draw.normal(hidden),
        scale=torch.tensor([0.02], device=device),
    )


def _bind(function: Any, dtype: torch.dtype, is_static: bool, i: Inputs) -> Prepared:
    residual = i.residual.clone()  # grows by x with every run

    def call() -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        given = options(dtype, is_static, i)
        return function(i.x, i.weight, eps=EPS, residual=residual, **given), residual

    return Prepared(call)


def _rms_norm(i: Inputs) -> Prepared:
    residual = i.residual.clone()

    def call() -> tuple[tuple[Tensor, None], Tensor]:
        residual.add_(i.x)
        return (rms_norm(residual, i.weight.shape, i.weight, EPS), None), residual

    return Prepared(call)


def _expected(reference: Make, i: Inputs) -> Tensor:
    return _values(reference(i).call()).double()


def _values(output: tuple[tuple[Tensor, Tensor | None], Tensor]) -> Tensor:
    """The output and the new residual, as one vector."""
    found, residual = output
    return torch.cat([values(found).flatten(), residual.flatten()])
