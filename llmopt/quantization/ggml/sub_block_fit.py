"""The grid of each sub-block on its own: the first step of the least squares search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantization.ggml.columns import ratio, signed_peak
from llmopt.quantization.ggml.effort import Effort
from llmopt.quantization.ggml.moments import Moments, Trial
from llmopt.quantization.ggml.types import GGMLType


@dataclass(frozen=True, slots=True)
class Fit:
    """Codes of each sub-block with the grid of least error for them.

    Attributes:
        moments: of the codes.
        steps: ``(sub_blocks, blocks) float32``.
        shifts: likewise, ``None`` in types without minimum.
        error: likewise.
    """

    moments: Moments
    steps: Tensor
    shifts: Tensor | None
    error: Tensor


_UNIMPORTANT = 1e-3  # of the mean importance in a sub-block

# Where the two ends of a range move: one of them, both, together, apart.
_MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (-1, 1), (1, -1))
_MOVES_ABOUT_ZERO = ((-1, 1), (1, -1))


def fit_sub_blocks(trial: Trial, effort: Effort) -> Fit:
    """The best grid found for each sub-block on its own.

    Grids of several widths come first, then such as differ from the best so far in where their ends
    lie. Each is compared by the error of its codes on their own least squares grid.
    """
    kind, fit = trial.kind, None
    for steps, shifts in _first_grids(trial, effort):
        fit = _better(trial, fit, steps, shifts)
    assert fit is not None
    for size in effort.moves:
        for bottom, top in _MOVES if kind.min_sign else _MOVES_ABOUT_ZERO:
            steps = fit.steps * (1 + (top - bottom) * size / kind.max_code)
            moved = None if fit.shifts is None else fit.shifts + fit.steps * (bottom * size)
            fit = _better(trial, fit, steps, moved)
    return fit


def _first_grids(trial: Trial, effort: Effort) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Steps and shifts by the largest value of each sub-block, or by its range."""
    kind = trial.kind
    # Values that hardly count need not fit in.
    counts = trial.weights * kind.sub_block > _UNIMPORTANT * trial.sum_weights
    values = trial.x * counts
    if kind.min_sign:
        lowest = values.amin(0).clamp_(max=_shift_limit(kind))
        span = values.amax(0) - lowest
        for width in effort.widths:
            # The middle of the range stays where it is.
            yield span / (kind.max_code * width), lowest + span * (0.5 - 0.5 / width)
        return
    levels, peak = kind.levels(), signed_peak(values)
    ends = [float(levels[0]), float(levels[-1])]
    for end in ends if effort.both_directions else ends[:1]:
        for width in effort.widths:
            yield peak / (end * width), None


def _shift_limit(kind: GGMLType) -> float:
    """Sub-blocks share the sign of their minimums; where blocks are not cut any will do."""
    return float("inf") if kind.sub_min_limit is None else 0.0


def _better(trial: Trial, fit: Fit | None, steps: Tensor, shifts: Tensor | None) -> Fit:
    """``fit``, or where it is better what comes of the codes nearest on another grid."""
    if shifts is None:
        moments = trial.moments(steps, None)
        steps = ratio(moments.level_x, moments.level_2)
    else:
        limit = _shift_limit(trial.kind)
        moments = trial.moments(steps, shifts.clamp(max=limit))
        steps, shifts = trial.best_grid(moments, shift_limit=limit)
    error = trial.error(moments, steps, shifts)
    if fit is None:
        return Fit(moments, steps, shifts, error)
    better = error < fit.error
    if shifts is not None and fit.shifts is not None:
        shifts = torch.where(better, shifts, fit.shifts)
    return Fit(
        moments.where(better, fit.moments),
        torch.where(better, steps, fit.steps),
        shifts,
        torch.minimum(error, fit.error),
    )
