"""linear_fp8: square products that fill the chip, and a model's layer at several batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.benchmark import Benchmark, Make, Prepared, Scale, Tunable
from benchmarks.goals import CUBLAS, FP8_CASES, SCALED_MM
from benchmarks.peers import cublas, scaled_mm
from benchmarks.suite._inputs import Draw, Inputs
from llmopt_kernels.linear_fp8 import (
    Fp8Config,
    Granularity,
    candidate_configs,
    launch_linear_fp8,
    linear_fp8,
    linear_fp8_reference,
    quantize_weight,
    shipped_config,
)
from llmopt_kernels.quantize_rows import quantize_rows

FP8 = torch.float8_e4m3fn
SQUARE = {"real": 8192, "tiny": 256}
LAYER = {"real": (28672, 4096), "tiny": (96, 256)}
BATCHES = {"real": (1, 16, 64, 512, 4096), "tiny": (3,)}
SCALES: tuple[tuple[str, Granularity, bool], ...] = (
    ("tensor scales", "tensor", False),
    ("token scales", "channel", False),
    ("token scales, fast sums", "channel", True),
    ("block scales", "block", False),
)
"""In words, of the weight, and whether sums stay in the matrix unit's precision."""

TOLERANCE, DYNAMIC_TOLERANCE, FAST_TOLERANCE = 8e-3, 1.2e-2, 3e-2
"""Outputs are rounded to bfloat16; activations on the edge between two codes may be either; fast
sums keep about 14 bits."""


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Quantized activations first, then bfloat16 ones that are quantized on the way."""
    size = SQUARE[scale]
    for words, granularity, fast in SCALES:
        name = f"{words}, {size} x {size} x {size}"
        yield _benchmark(name, (size, size, size), granularity, dynamic=False, fast=fast)
    for tokens in BATCHES[scale]:
        shape = (tokens, *LAYER[scale])
        end = f"{LAYER[scale][0]} x {LAYER[scale][1]}, batch {tokens}"
        yield _benchmark(f"token scales, {end}", shape, "channel", dynamic=False)
        yield _benchmark(f"dynamic token scales, {end}", shape, "channel", dynamic=True)
        yield _benchmark(f"dynamic block scales, {end}", shape, "block", dynamic=True)


def _benchmark(
    name: str,
    shape: tuple[int, int, int],
    granularity: Granularity,
    *,
    dynamic: bool,
    fast: bool = False,
) -> Benchmark:
    tokens, out_features, in_features = shape
    x_bytes = (2 if dynamic else 1) * tokens * in_features
    flops = 2 * tokens * out_features * in_features
    num_bytes = x_bytes + out_features * in_features + 2 * tokens * out_features
    bound_by_flops = flops / num_bytes > 500
    grouped = granularity == "block"
    peers: dict[str, Make] = {SCALED_MM: partial(_scaled_mm, fast), CUBLAS: _cublas}
    if dynamic:
        peers = {f"quantize_rows, then {SCALED_MM}": partial(_quantize_then_scaled_mm, grouped)}
    return Benchmark(
        "linear_fp8",
        name,
        unit="TFLOP/s" if bound_by_flops else "GB/s",
        ceiling="fp8" if bound_by_flops else "copy",
        num_bytes=num_bytes,
        num_flops=flops,
        build=partial(_build, shape, granularity, dynamic),
        ours=partial(_ours, fast),
        expected=lambda i: linear_fp8_reference(i.x, i.weight, x_scale=i.x_scale),
        tolerance=DYNAMIC_TOLERANCE if dynamic else FAST_TOLERANCE if fast else TOLERANCE,
        peers=peers,
        tunable=Tunable(
            candidate_configs(*shape, grouped=grouped),
            shipped_config(*shape, grouped=grouped),
            partial(_with_config, fast),
        ),
        priority=0 if name in FP8_CASES.values() else 1,
    )


def _build(
    shape: tuple[int, int, int],
    granularity: Granularity,
    dynamic: bool,
    device: torch.device,
    seed: int,
) -> Inputs:
    tokens, out_features, in_features = shape
    draw = Draw(device, seed)
    weight = quantize_weight(draw.normal(out_features, in_features, scale=0.02), granularity)
    x, x_scale = draw.normal(tokens, in_features), None
    if not dynamic and granularity == "tensor":
        quantized = quantize_weight(x, "tensor")
        x, x_scale = quantized.codes, quantized.scales
    elif not dynamic:
        x, x_scale = quantize_rows(x, FP8, 128 if granularity == "block" else None)
    return Inputs(x=x, x_scale=x_scale, weight=weight)


def _ours(fast: bool, i: Inputs) -> Prepared:
    return Prepared(lambda: linear_fp8(i.x, i.weight, x_scale=i.x_scale, fast_accumulation=fast))


def _with_config(fast: bool, i: Inputs, config: Fp8Config) -> Prepared:
    return Prepared(
        lambda: launch_linear_fp8(
            i.x, i.weight, x_scale=i.x_scale, fast_accumulation=fast, config=config
        )
    )


def _scaled_mm(fast: bool, i: Inputs) -> Prepared:
    return scaled_mm(i.x, i.weight.codes, i.x_scale, i.weight.scales, torch.bfloat16, fast)


def _quantize_then_scaled_mm(grouped: bool, i: Inputs) -> Prepared:
    group = 128 if grouped else None

    def call() -> object:
        codes, x_scale = quantize_rows(i.x, FP8, group)
        return scaled_mm(codes, i.weight.codes, x_scale, i.weight.scales, i.x.dtype).call()

    return Prepared(call)


def _cublas(i: Inputs) -> Prepared:
    columns = i.x.shape[1]
    scales = i.x_scale.repeat_interleave(128, 1)[:, :columns] if _by_group(i) else i.x_scale
    x = (i.x.float() * scales).bfloat16()
    return cublas(x, i.weight.dequantize(torch.float32).bfloat16())


def _by_group(i: Inputs) -> bool:
    return bool(i.x_scale.dim() == 2 and i.x_scale.shape[1] > 1)
