"""gptq_columns: one block of columns of a layer's weight, beside the same loop in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Prepared, Scale, Tunable
from benchmarks.goals import GPTQ, TORCH_LOOP
from benchmarks.suite._inputs import Draw, Inputs
from llmopt_kernels.gptq_columns import (
    ColumnsConfig,
    ColumnsProblem,
    candidate_configs,
    gptq_columns,
    gptq_columns_reference,
    launch_gptq_columns,
    shipped_config,
)

SHAPES = {"real": ((4096, 128), (14336, 128)), "tiny": ((5, 32),)}
GROUP_COLUMNS = 64
MAX_CODE = 15


def benchmarks(scale: Scale) -> Iterator[Benchmark]:
    """Rows of the weight (its output features) and columns of the block; 4 bits, groups of 64."""
    for rows, columns in SHAPES[scale]:
        name = f"{rows} rows, {columns} columns"
        groups = -(-columns // GROUP_COLUMNS)
        yield Benchmark(
            "gptq_columns",
            name,
            unit="GB/s",
            ceiling="copy",
            num_bytes=13 * rows * columns + 8 * groups * rows + 4 * columns * columns // 2,
            num_flops=columns * columns * rows,
            build=partial(_build, rows, columns),
            ours=partial(_bind, _operation),
            expected=_expected,
            # A value on the edge between two codes falls on either side, and its row goes another
            # way from there: some codes in half a million.
            tolerance=5e-3,
            part=_values,
            peers={
                TORCH_LOOP: partial(_bind, gptq_columns_reference, capture=False),
                f"{TORCH_LOOP}, in a CUDA graph": partial(_bind, gptq_columns_reference),
            },
            tunable=Tunable(
                candidate_configs(rows),
                shipped_config(rows),
                _with_config,
            ),
            priority=0 if name == GPTQ[1] else 1,
        )


def _build(rows: int, columns: int, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    groups = -(-columns // GROUP_COLUMNS)
    weight = draw.normal(columns, rows, dtype=torch.float32, scale=0.02)
    fed = draw.normal(columns, rows, dtype=torch.float32, scale=0.002)
    return Inputs(
        adjusted=weight + fed,
        feedback=draw.normal(columns, columns, dtype=torch.float32, scale=0.05).tril(-1),
        scales=draw.uniform(groups, rows, low=0.006, high=0.01),
        zero_points=draw.integers(groups, rows, high=MAX_CODE + 1).float(),
        groups=torch.arange(columns, device=device) // GROUP_COLUMNS,
        errors=weight,
        codes=torch.empty(columns, rows, dtype=torch.uint8, device=device),
    )


def _bind(function: Any, i: Inputs, capture: bool = True, **options: object) -> Prepared:
    """Has its own buffers, not filled again between runs: times do not depend on values."""
    adjusted, errors, codes = i.adjusted.clone(), i.errors.clone(), i.codes.clone()
    problem = ColumnsProblem(
        adjusted, i.feedback, i.scales, i.zero_points, i.groups, errors, codes, MAX_CODE
    )

    def call() -> tuple[Tensor, Tensor, Tensor]:
        function(problem, **options)
        return codes, errors, i.scales

    return Prepared(call, capture=capture)


def _operation(problem: ColumnsProblem) -> None:
    gptq_columns(**problem.tensors(), max_code=problem.max_code)


def _with_config(i: Inputs, config: ColumnsConfig) -> Prepared:
    return _bind(launch_gptq_columns, i, config=config)


def _expected(i: Inputs) -> Tensor:
    wide = Inputs(**{name: t.double() for name, t in vars(i).items()})
    wide.groups, wide.codes = i.groups, i.codes
    return _values(_bind(gptq_columns_reference, wide).call())


def _values(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Codes, and errors in steps of the grid, as one vector."""
    codes, errors, scales = output
    return torch.cat([codes.flatten().double(), (errors / scales.mean()).flatten().double()])
