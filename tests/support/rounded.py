"""How rows that a kernel rounded to 16 bit, fp8 or int8 are held against their reference."""

from __future__ import annotations

import torch
from support.comparing import TOLERANCE, relative_error
from torch import Tensor

Rows = tuple[Tensor, Tensor | None]


def assert_rounded_alike(found: Rows, expected: Rows, exact: Tensor) -> None:
    """Hold rows and their scales against the reference's.

    Args:
        found: the kernel's rows and scales.
        expected: the reference's; rows in float64 where the kernel's are in 16 bit.
        exact: the rows before any rounding, float64.
    """
    (rows, scale), (expected_rows, expected_scale) = found, expected
    if scale is None or expected_scale is None:
        assert scale is expected_scale
        assert relative_error(rows, expected_rows) <= TOLERANCE[rows.dtype]
        return
    assert scale.dtype == torch.float32 and rows.dtype == expected_rows.dtype
    torch.testing.assert_close(scale, expected_scale, rtol=2e-6, atol=0)
    scaled = exact / expected_scale.double()
    off = (rows.double() - expected_rows.double()).abs()
    if rows.dtype == torch.int8:
        tie = (scaled - scaled.floor() - 0.5).abs() < 1e-3
        assert bool((off <= tie.double()).all()), f"{int((off > tie).sum())} codes differ"
    else:  # neighbours in fp8, and only where the value lies half way between the two
        limited = scaled.clamp(-448, 448)
        nearest = (expected_rows.double() - limited).abs()
        farther = (rows.double() - limited).abs()
        assert bool((farther <= nearest * (1 + 1e-3) + 1e-9).all())
