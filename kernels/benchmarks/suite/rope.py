"""rope: rotating the queries and keys of a prompt, and of a batch that decodes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Prepared, Scale
from benchmarks.suite._inputs import Draw, Inputs
from llmopt_kernels.rope import rope, rope_reference

TOKENS = {"real": (8192, 64), "tiny": (5,)}
HEADS, HEAD_DIM = 40, 128
MAX_POSITIONS = 8192


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """32 query heads and 8 key heads of 128 channels, bfloat16."""
    for tokens in TOKENS[scale]:
        elements = tokens * HEADS * HEAD_DIM
        yield Benchmark(
            "rope",
            f"{tokens} tokens",
            unit="GB/s",
            ceiling="copy",
            num_bytes=2 * 2 * elements + tokens * (4 + 4 * HEAD_DIM),
            num_flops=3 * elements,
            build=partial(_build, tokens),
            ours=_ours,
            expected=lambda i: rope_reference(i.x, i.positions, i.cos, i.sin),
            tolerance=8e-3,
            peers={"torch eager": _eager},
            priority=2,
        )


def _build(tokens: int, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    angles = draw.uniform(MAX_POSITIONS, HEAD_DIM // 2, high=6.28)
    return Inputs(
        x=draw.normal(tokens, HEADS, HEAD_DIM),
        positions=draw.integers(tokens, high=MAX_POSITIONS),
        cos=angles.cos(),
        sin=angles.sin(),
    )


def _ours(i: Inputs) -> Prepared:
    x = i.x.clone()  # rotated in place, again and again: its norm stays
    return Prepared(lambda: rope(x, i.positions, i.cos, i.sin))


def _eager(i: Inputs) -> Prepared:
    def call() -> Tensor:
        c, s = i.cos[i.positions][:, None].bfloat16(), i.sin[i.positions][:, None].bfloat16()
        first, second = i.x.chunk(2, -1)
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    return Prepared(call)
