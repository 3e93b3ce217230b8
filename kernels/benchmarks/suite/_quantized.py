"""What the operations that end in a quantization of rows have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.suite._inputs import Inputs

TOKENS = {"real": (8192, 64), "tiny": (5,)}
KINDS: tuple[tuple[str, torch.dtype, bool], ...] = (
    ("bf16", torch.bfloat16, False),
    ("fp8 by token", torch.float8_e4m3fn, False),
    ("fp8, scale given", torch.float8_e4m3fn, True),
    ("int8 by token", torch.int8, False),
)
"""Of an output: its name, its element type, whether its scale is given."""

TOLERANCE = 8e-3
"""Rounded to bfloat16; codes differ where a value lies on the edge between two."""


def options(dtype: torch.dtype, is_static: bool, i: Inputs) -> dict[str, object]:
    """Of the operation."""
    return {"dtype": dtype, "scale": i.scale if is_static else None}


def output_bytes(tokens: int, columns: int, dtype: torch.dtype, is_static: bool) -> int:
    """Of codes and scales."""
    by_token = 4 * tokens if dtype.itemsize == 1 and not is_static else 0
    return tokens * columns * dtype.itemsize + by_token


def values(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """What codes and scales mean, float32 or wider."""
    codes, scales = output
    wide = codes if codes.dtype == torch.float64 else codes.float()
    return wide if scales is None else wide * scales
