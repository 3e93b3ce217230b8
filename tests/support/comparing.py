"""How a kernel's result is held against its float64 reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""Relative error by norm: rounding the result once, and a little for the order of a sum."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where NaN is found."""
    difference = float((found.double() - expected.double()).norm())
    scale = float(expected.double().norm()) or 1.0
    return math.inf if math.isnan(difference) else difference / scale


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """A tensor of NaN, for outputs and padding that must not be read or left unwritten."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
