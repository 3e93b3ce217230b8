"""quantize_rows: activations to fp8 and int8, by token and by groups of 128 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Prepared, Scale
from benchmarks.suite._inputs import Draw, Inputs
from llmopt_kernels.quantize_rows import quantize_rows, quantize_rows_reference

SHAPES = {"real": ((8192, 4096), (64, 4096)), "tiny": ((3, 200),)}
KINDS = (
    ("fp8 by token", torch.float8_e4m3fn, None),
    ("fp8 by group", torch.float8_e4m3fn, 128),
    ("int8 by token", torch.int8, None),
)


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Bfloat16 activations."""
    for tokens, columns in SHAPES[scale]:
        for kind, dtype, group in KINDS:
            scales = tokens if group is None else tokens * -(-columns // group)
            yield Benchmark(
                "quantize_rows",
                f"{kind}, {tokens} x {columns}",
                unit="GB/s",
                ceiling="copy",
                num_bytes=3 * tokens * columns + 4 * scales,
                num_flops=3 * tokens * columns,
                build=partial(_build, tokens, columns),
                ours=partial(_bind, quantize_rows, dtype, group),
                expected=partial(_expected, dtype, group),
                # bfloat16 values often lie on the edge between two codes: either is right.
                tolerance=1e-2,
                part=values,
                peers={"torch eager": partial(_bind, quantize_rows_reference, dtype, group)},
                priority=2,
            )


def values(output: tuple[Tensor, Tensor]) -> Tensor:
    """Codes and scales ``(tokens, groups)`` to what they mean, float32."""
    codes, scales = output
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(128, 1)[:, : codes.shape[1]]
    return codes.float() * scales


def _bind(
    quantize: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    group: int | None,
    i: Inputs,
) -> Prepared:
    return Prepared(lambda: quantize(i.x, dtype, group))


def _expected(dtype: torch.dtype, group: int | None, i: Inputs) -> Tensor:
    return values(quantize_rows_reference(i.x, dtype, group))


def _build(tokens: int, columns: int, device: torch.device, seed: int) -> Inputs:
    return Inputs(x=Draw(device, seed).normal(tokens, columns))
