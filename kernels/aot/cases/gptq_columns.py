"""gptq_columns, by what is fed back and by configuration."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aot.case import Case, meta
from llmopt_kernels.gptq_columns import (
    ColumnsConfig,
    ColumnsProblem,
    candidate_configs,
    launch_gptq_columns,
)

ROWS = 4096
BLOCK = 128


def cases() -> Iterator[Case]:
    """A block of 128 columns of a weight of 4096 rows."""
    for residuals in (False, True):
        kind = "residuals" if residuals else "errors"
        for index, config in enumerate(candidate_configs(ROWS)):
            name = (
                f"gptq_columns {kind} {config.block_rows}x{config.columns_in_registers} "
                f"{config.num_warps} warps"
            )
            yield Case(
                name,
                lambda residuals=residuals, config=config: _launch(residuals, config),
                tensor_cores=False,
                shipped=index == 0,
            )


def _launch(residuals: bool, config: ColumnsConfig) -> None:
    f32 = torch.float32
    problem = ColumnsProblem(
        meta(BLOCK, ROWS, dtype=f32),
        meta(BLOCK, 4096, dtype=f32)[:, :BLOCK],
        meta(32, ROWS, dtype=f32),
        meta(32, ROWS, dtype=f32),
        meta(BLOCK, dtype=torch.int64),
        meta(BLOCK, ROWS, dtype=f32),
        meta(BLOCK, ROWS, dtype=torch.uint8),
        max_code=15,
        residuals=residuals,
    )
    launch_gptq_columns(problem, config)
