"""linear_w4a16: a model's layers at the batch sizes of decoding, and a prompt's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.benchmark import Benchmark, Prepared, Scale, Tunable
from benchmarks.goals import CUBLAS, W4A16_CASES
from benchmarks.peers import cublas, tinygemm
from benchmarks.suite._inputs import Draw, Inputs
from llmopt_kernels.gpu_weight import PLANES, to_gpu_weight
from llmopt_kernels.linear_w4a16 import (
    LinearConfig,
    candidate_configs,
    launch_linear_w4a16,
    linear_w4a16,
    linear_w4a16_reference,
    shipped_config,
)
from llmopt_kernels.packed_weight import PackedWeight, pack_codes, unpack_codes

GROUP_SIZE = 128
TINYGEMM = "torch int4 tinygemm"


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight ``(out, in)`` in groups of 128 columns, and the batches it is tried at."""

    out_features: int
    in_features: int
    batches: tuple[int, ...]
    bits: int = 4
    asymmetric: bool = False
    act_order: bool = False

    def name(self, batch: int) -> str:
        """Of the problem."""
        words = ["8 bits"] * (self.bits == 8) + ["asymmetric"] * self.asymmetric
        words += ["act-order"] * self.act_order
        shape = f"{self.out_features} x {self.in_features}"
        return ", ".join([shape, *words, f"batch {batch}"])

    @property
    def num_groups(self) -> int:
        """Groups of a row."""
        return self.in_features // GROUP_SIZE

    @property
    def num_bytes(self) -> int:
        """Of codes, 16-bit scales and zero points."""
        groups = self.out_features * self.num_groups
        codes = self.out_features * self.in_features * self.bits // 8
        return codes + groups * (3 if self.asymmetric else 2)


# Gate and up projection of Llama 3.1 8B in one, and its down projection.
LAYERS = {
    "real": (
        Layer(28672, 4096, (1, 4, 16, 32, 64, 256, 2048)),
        Layer(4096, 14336, (1, 16, 64)),
        Layer(28672, 4096, (1,), asymmetric=True),
        Layer(4096, 14336, (1,), act_order=True),
        Layer(28672, 4096, (1, 64), bits=8),
    ),
    "tiny": (
        Layer(48, 256, (1, 20)),
        Layer(48, 256, (3,), asymmetric=True),
        Layer(48, 256, (3,), act_order=True),
        Layer(48, 256, (3,), bits=8),
    ),
}


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Bfloat16 activations and scales."""
    for layer in LAYERS[scale]:
        for batch in layer.batches:
            yield _benchmark(layer, batch)


def _benchmark(layer: Layer, batch: int) -> Benchmark:
    out_features, in_features = layer.out_features, layer.in_features
    bound_by_flops = batch > 128
    name = layer.name(batch)
    num_chunks = math.ceil(in_features / (PLANES[0] * (16 // layer.bits)))
    peers = {CUBLAS: _cublas}
    if layer.bits == 4 and not layer.act_order:
        peers[TINYGEMM] = _tinygemm
    return Benchmark(
        "linear_w4a16",
        name,
        unit="TFLOP/s" if bound_by_flops else "GB/s",
        ceiling="bf16" if bound_by_flops else "copy",
        num_bytes=layer.num_bytes + 2 * batch * (in_features + out_features),
        num_flops=2 * batch * in_features * out_features,
        build=partial(_build, layer, batch),
        ours=lambda i: Prepared(lambda: linear_w4a16(i.x, i.ours)),
        expected=lambda i: linear_w4a16_reference(i.x, i.weight),
        tolerance=8e-3,  # the output is rounded to bfloat16
        peers=peers,
        tunable=Tunable(
            candidate_configs(batch, out_features, num_chunks),
            shipped_config(batch, out_features, num_chunks),
            _with_config,
        ),
        priority=0 if name in W4A16_CASES.values() else 1,
    )


def _build(layer: Layer, batch: int, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    shape, groups = (layer.out_features, layer.in_features), layer.num_groups
    codes = draw.integers(*shape, high=1 << layer.bits, dtype=torch.uint8)
    scales = draw.uniform(shape[0], groups, low=0.01, high=0.02).bfloat16()
    zeros = None
    if layer.asymmetric:
        zeros = draw.integers(shape[0], groups, high=1 << layer.bits, dtype=torch.uint8)
    index = draw.permutation(shape[1]) // GROUP_SIZE if layer.act_order else None
    weight = PackedWeight(pack_codes(codes, layer.bits), layer.bits, shape[1], scales, zeros, index)
    return Inputs(x=draw.normal(batch, shape[1]), weight=weight, ours=to_gpu_weight(weight))


def _with_config(i: Inputs, config: LinearConfig) -> Prepared:
    return Prepared(lambda: launch_linear_w4a16(i.x, i.ours, config=config))


def _cublas(i: Inputs) -> Prepared:
    return cublas(i.x, i.weight.dequantize(i.x.dtype))


def _tinygemm(i: Inputs) -> Prepared:
    codes = unpack_codes(i.weight.packed, 4, i.weight.in_features)
    return tinygemm(i.x, codes, i.weight.scales, i.weight.zero_points)
