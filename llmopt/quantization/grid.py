"""Scales and zero points: the grid of representable values that a group of weights gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.scheme import Scheme

Clip = Literal["none", "mse", "activation"]

SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

# Two and three bits want a range down to about half the largest magnitude; 8 bits hardly any.
_SHRINK_FACTORS = tuple(1.0 - 0.025 * step for step in range(29))
_SEARCH_ELEMENTS = 1 << 17  # values searched at once: the scratch stays in a core's cache
_MOMENT_DAMPING = 0.01  # of the mean diagonal: the weight alone decides where no input was seen
_FLOAT16_SMALLEST_SCALE = 2.0**-20  # subnormal, with five bits of precision left


@dataclass(frozen=True, slots=True)
class Grid:
    """One grid a group; leading dimensions are those of the values it was made for.

    Attributes:
        scales: ``(...)`` in the element type that is stored.
        zero_points: ``(...) uint8``, or ``None`` when symmetric.
    """

    scales: Tensor
    zero_points: Tensor | None


def make_grid(
    values: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    clip: Clip,
    moments: Tensor | None = None,
) -> Grid:
    """The grid of each group in ``values (..., columns)``.

    The range always includes zero, so zero is exact; zero points are at least 1. ``none`` takes
    the whole range; ``mse`` shrinks it by the factor (of 29 from 1.0 down to 0.3) with the least
    squared error, ``activation`` by the one with the least squared error of the group's output,
    ``(w - q) H (w - q)^T``. That one needs ``values (rows, groups, columns)`` and each group's
    second moment, ``moments (groups, columns, columns)`` float32 (:func:`group_moments`).

    Raises:
        BadInputError: if ``scale_dtype`` is none of :data:`SCALE_DTYPES`.
        NumericalError: on NaN or infinity, and when a scale overflows ``scale_dtype``.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise BadInputError(
            f"scales cannot be stored as {scale_dtype}",
            f"use one of {', '.join(str(dtype) for dtype in SCALE_DTYPES)}",
        )
    values = values.float()
    low, high = _range(values, scheme)
    # Where the whole range fits its shrunk ones do too, so one check is enough.
    _check_scales((high - low) / scheme.max_code, scheme, scale_dtype)
    if clip == "none":
        return _grid_of_range(low, high, scheme, scale_dtype)
    if clip == "mse":
        return _search(values, low, high, scheme, scale_dtype)
    assert moments is not None and values.ndim == 3
    found = [
        _search(values[:, group], low[:, group], high[:, group], scheme, scale_dtype, moment)
        for group, moment in enumerate(moments)
    ]
    zero_points = [grid.zero_points for grid in found if grid.zero_points is not None]
    return Grid(
        torch.stack([grid.scales for grid in found], dim=1),
        torch.stack(zero_points, dim=1) if zero_points else None,
    )


def group_moments(hessian: Tensor, group_columns: int, order: Tensor | None = None) -> Tensor:
    """The diagonal blocks of ``hessian (in, in)``, ``(groups, columns, columns)``, damped.

    ``order`` is that in which the columns were dealt out to groups; left to right without one.
    """
    columns = torch.arange(len(hessian), device=hessian.device) if order is None else order
    members = columns.view(-1, group_columns)  # (groups, columns)
    blocks = hessian[members.unsqueeze(2), members.unsqueeze(1)].float()
    mean = blocks.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)  # (groups, 1)
    damping = torch.where(mean > 0, _MOMENT_DAMPING * mean, 1.0)
    blocks.diagonal(dim1=1, dim2=2).add_(damping)
    return blocks


def encode(values: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The nearest codes, ``(..., columns) uint8``, of ``values`` on the stored grid."""
    scales = grid.scales.float().unsqueeze(-1)
    zero_points = _float_zero_points(grid, scheme).unsqueeze(-1)
    centred = torch.round(values.float() / scales)
    return (centred + zero_points).clamp_(0, scheme.max_code).to(torch.uint8)


def _float_zero_points(grid: Grid, scheme: Scheme) -> Tensor:
    if grid.zero_points is None:
        return torch.full_like(grid.scales, scheme.midpoint, dtype=torch.float32)
    return grid.zero_points.float()


def _range(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(values, dim=-1)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        return -high, high
    high = high.clamp(min=0.0)
    # Room for one code below zero, so that no zero point is 0: GPTQ's first file format stores
    # zero points less one, and its readers disagree about what a stored -1 means.
    return torch.minimum(low, -high / (scheme.max_code - 1)), high


def _grid_of_range(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    exact = (high - low) / scheme.max_code
    smallest = (
        _FLOAT16_SMALLEST_SCALE
        if scale_dtype is torch.float16
        else torch.finfo(scale_dtype).smallest_normal
    )
    # A group of zeros has no range: any scale codes it exactly, and 1 is harmless to kernels.
    stored = torch.where(exact == 0, 1.0, exact.clamp(min=smallest)).to(scale_dtype)
    if scheme.symmetric:
        return Grid(stored, None)
    zero_points = torch.round(-low / stored.float()).clamp_(1, scheme.max_code)
    return Grid(stored, zero_points.to(torch.uint8))


def _check_scales(exact: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    """Refuse scales whose largest product with a centred code is not a finite ``scale_dtype``."""
    if not bool(torch.isfinite(exact).all()):
        raise NumericalError(
            "NaN or infinity in a weight", "the source tensor is damaged; fetch the model again"
        )
    reach = scheme.midpoint if scheme.symmetric else scheme.max_code
    largest = torch.finfo(scale_dtype).max / reach
    if exact.numel() and float(exact.max()) > largest:
        raise NumericalError(
            f"a weight's scale {float(exact.max()):.4g} does not fit {scale_dtype}",
            "store the model and its scales in bfloat16 or float32",
        )


def _search(
    values: Tensor,
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    moment: Tensor | None = None,
) -> Grid:
    columns = values.shape[-1]
    rows, lows, highs = values.reshape(-1, columns), low.reshape(-1), high.reshape(-1)
    chunk = max(1, _SEARCH_ELEMENTS // columns)
    found = [
        _search_rows(rows[part], lows[part], highs[part], scheme, scale_dtype, moment)
        for start in range(0, rows.shape[0], chunk)
        for part in (slice(start, start + chunk),)
    ]
    scales = torch.cat([grid.scales for grid in found]).view(low.shape)
    zero_points = [grid.zero_points for grid in found if grid.zero_points is not None]
    return Grid(scales, torch.cat(zero_points).view(low.shape) if zero_points else None)


def _search_rows(
    rows: Tensor,
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    moment: Tensor | None,
) -> Grid:
    best = _grid_of_range(low, high, scheme, scale_dtype)
    best_scales, best_zero_points = best.scales, best.zero_points
    least = torch.full_like(low, torch.inf)
    scratch = torch.empty_like(rows)
    for factor in _SHRINK_FACTORS:
        grid = _grid_of_range(low * factor, high * factor, scheme, scale_dtype)
        error = _squared_error(rows, grid, scheme, scratch, moment)
        better = error < least
        least = torch.where(better, error, least)
        best_scales = torch.where(better, grid.scales, best_scales)
        if best_zero_points is not None and grid.zero_points is not None:
            best_zero_points = torch.where(better, grid.zero_points, best_zero_points)
    return Grid(best_scales, best_zero_points)


def _squared_error(
    rows: Tensor, grid: Grid, scheme: Scheme, scratch: Tensor, moment: Tensor | None
) -> Tensor:
    """In units of each row's own magnitude, so that the square of a tiny weight is not zero."""
    scales = grid.scales.float().unsqueeze(-1)
    torch.div(rows, scales, out=scratch).round_()
    if grid.zero_points is None:
        scratch.clamp_(-scheme.midpoint, scheme.max_code - scheme.midpoint)
    else:
        zero_points = grid.zero_points.float().unsqueeze(-1)
        torch.clamp(scratch, -zero_points, scheme.max_code - zero_points, out=scratch)
    scratch.mul_(scales).sub_(rows)
    largest = rows.abs().amax(dim=-1, keepdim=True)
    scratch.div_(torch.where(largest == 0, 1.0, largest))
    if moment is None:
        return scratch.square_().sum(dim=-1)
    return (scratch @ moment).mul_(scratch).sum(dim=-1)
