"""linear_w4a16: each tile that is shipped, by bits, zero points, groups and element type."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from aot.case import Case, meta
from llmopt_kernels.gpu_weight import PLANES, GpuWeight
from llmopt_kernels.linear_w4a16 import KERNEL_DTYPES, candidate_configs, launch_linear_w4a16

OUT, IN = 4096, 4096
BATCHES = (1, 32, 64)
"""One for each tile that ``shipped_config`` chooses among."""

SHIPPED = {
    (1, 4, False, 128, torch.bfloat16),
    (1, 4, True, 128, torch.bfloat16),
    (1, 4, True, 32, torch.bfloat16),
    (1, 4, False, IN, torch.bfloat16),
    (1, 4, True, 128, torch.float16),
    (1, 8, True, 128, torch.bfloat16),
    (1, 8, False, IN, torch.bfloat16),
    (1, 8, False, IN, torch.float16),
    (32, 4, False, 128, torch.bfloat16),
    (32, 4, True, 128, torch.float16),
    (32, 8, True, 128, torch.bfloat16),
    (64, 4, False, 128, torch.float16),
    (64, 4, True, 128, torch.bfloat16),
    (64, 4, True, 32, torch.bfloat16),
    (64, 8, True, 128, torch.bfloat16),
    (64, 8, False, IN, torch.bfloat16),
}
"""Batch, bits, zero points, group size, element type; those left out differ little from these."""


def cases() -> Iterator[Case]:
    """Every combination; those of ``SHIPPED`` always, the others and all candidates on demand."""
    everything = product(BATCHES, (4, 8), (False, True), (32, 128, IN), KERNEL_DTYPES)
    for batch, bits, asymmetric, group_size, dtype in everything:
        group = "channel" if group_size == IN else str(group_size)
        name = (
            f"linear_w{bits}a16 batch {batch} group {group} "
            f"{'zeros' if asymmetric else 'symmetric'} {str(dtype).removeprefix('torch.')}"
        )
        x, bias = meta(batch, IN, dtype=dtype), meta(OUT, dtype=dtype)
        weight = meta_weight(bits, asymmetric, group_size, dtype)
        call = partial(launch_linear_w4a16, x, weight, bias)
        shipped = (batch, bits, asymmetric, group_size, dtype) in SHIPPED
        yield Case(name, call, tensor_cores=True, shipped=shipped)
        if shipped:
            # Splits are an argument of the kernel: a tile's first candidate stands for the others.
            of_tile = {
                (c.block_batch, c.block_out, c.num_warps, c.num_stages): c
                for c in reversed(candidate_configs(batch, OUT, weight.packed.shape[0]))
            }
            for tile, config in of_tile.items():
                yield Case(
                    f"{name} {tile}",
                    partial(call, config=config),
                    tensor_cores=True,
                    shipped=False,
                )


def meta_weight(bits: int, asymmetric: bool, group_size: int, dtype: torch.dtype) -> GpuWeight:
    """A weight without storage."""
    plane = next(plane for plane in PLANES if group_size % plane == 0)
    groups = IN // group_size
    zeros = meta(-(-groups // 4), OUT, dtype=torch.int32) if asymmetric else None
    return GpuWeight(
        meta(IN // (plane * (16 // bits)), OUT, plane // 2, dtype=torch.int32),
        bits,
        OUT,
        IN,
        meta(groups, OUT, dtype=dtype),
        zeros,
    )
