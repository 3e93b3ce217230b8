"""Block types by weighted least squares: less error than llama.cpp's search for the same bytes.

What is made small is ``sum h (w - q)^2`` itself, ``h`` the importance of a column:

1. Each sub-block on its own: codes are tried on grids of several widths (of both directions where
   levels are not symmetric), and the least squares step and shift of each are compared. The ends of
   the best are then moved, a step or parts of one, and what comes of it compared likewise.
2. The steps of a block become whole multiples of a common ``d``, several of which are tried, each
   error weighed by what it costs; then the minimums likewise, each first moved to where the step
   that it got wants it.
3. Sweeps over whole blocks: codes given the grid, neighbouring whole numbers with codes of their
   own, then ``d`` and the minimum by least squares given all of these. The best state of a block
   over all sweeps is kept, so that more of them never harm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.quantization.ggml.columns import (
    Found,
    ratio,
    reciprocal,
    signed_peak,
    through_float16,
    to_float16,
)
from llmopt.quantization.ggml.effort import EFFORTS, Effort
from llmopt.quantization.ggml.moments import Moments, Trial
from llmopt.quantization.ggml.sub_block_fit import Fit, fit_sub_blocks
from llmopt.quantization.ggml.types import GGMLType

_SINGULAR = 3e-6


@dataclass(frozen=True, slots=True)
class _State:
    """A grid for each block: ``scales, mins (blocks,)``, whole numbers ``(sub_blocks, blocks)``."""

    scales: Tensor
    whole_scales: Tensor
    mins: Tensor | None = None
    whole_mins: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        return self.scales * self.whole_scales

    def shifts(self, sign: int) -> Tensor | None:
        if self.mins is None:
            return None
        assert self.whole_mins is not None
        return sign * self.mins * self.whole_mins

    def where(self, chosen: Tensor, other: _State) -> _State:
        """This where ``chosen (blocks,)``, elsewhere the other."""

        def chosen_part(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if ours is None or theirs is None:
                return None
            return torch.where(chosen, ours, theirs)

        return _State(
            torch.where(chosen, self.scales, other.scales),
            torch.where(chosen, self.whole_scales, other.whole_scales),
            chosen_part(self.mins, other.mins),
            chosen_part(self.whole_mins, other.whole_mins),
        )


def least_squares(
    x: Tensor, kind: GGMLType, weights: Tensor, effort: Effort | None = None
) -> Found:
    """Quantize blocks for the least weighted squared error.

    Args:
        x: ``(sub_block, sub_blocks, blocks) float32``.
        kind: a block type.
        weights: ``h``, like ``x``; the sum over a sub-block is positive.
        effort: how much is tried; ``None`` for what the type has by default.
    """
    effort = effort or EFFORTS[kind.name]
    trial = Trial(x, weights, kind)
    fit = fit_sub_blocks(trial, effort)
    state = _sweep(trial, _start(trial, fit, effort), effort)
    codes = trial.codes(state.steps, state.shifts(kind.min_sign))
    cut = kind.sub_scale_limits is not None
    return Found(
        codes,
        state.scales,
        state.whole_scales if cut else None,
        state.mins,
        state.whole_mins if cut else None,
    )


def _start(trial: Trial, fit: Fit, effort: Effort) -> _State:
    """The best of several ways for the sub-blocks to share scales and minimums."""
    best, best_error = None, None
    for divisors in effort.starts:
        state = _share(trial, fit, divisors)
        if len(effort.starts) == 1:
            return state
        state, _, errors = _neighbours(trial, state, ())
        error = errors.sum(0)
        if best is None or best_error is None:
            best, best_error = state, error
        else:
            best = state.where(error < best_error, best)
            best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def _share(trial: Trial, fit: Fit, divisors: tuple[float, ...]) -> _State:
    """Steps, then minimums, as whole multiples of one float16 a block."""
    kind, moments = trial.kind, fit.moments
    if kind.sub_scale_limits is None:
        state = _State(to_float16(fit.steps.squeeze(0), kind).float(), torch.ones_like(fit.steps))
        if fit.shifts is None:
            return state
        shifts = trial.best_shifts(moments, state.steps)
        mins = to_float16(shifts.squeeze(0), kind).float()
        return replace(state, mins=mins * kind.min_sign, whole_mins=torch.ones_like(shifts))
    if kind.sub_min_limit is None or moments.level is None:
        return _State(*_whole(fit.steps, moments.level_2, kind.sub_scale_limits, kind, divisors))
    # What a step costs once the minimum has followed it.
    costs = moments.level_2 - moments.level * ratio(moments.level, trial.sum_weights)
    costs = costs.clamp_(min=0)
    state = _State(*_whole(fit.steps, costs, kind.sub_scale_limits, kind, divisors))
    minimums = trial.best_shifts(moments, state.steps).neg_().clamp_(min=0)
    limits = (0, kind.sub_min_limit)
    mins, whole = _whole(minimums, trial.sum_weights, limits, kind, divisors)
    return replace(state, mins=mins, whole_mins=whole)


def _whole(
    values: Tensor,
    costs: Tensor,
    limits: tuple[int, int],
    kind: GGMLType,
    divisors: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """``values (sub_blocks, blocks)`` as a float16 times whole numbers within ``limits``.

    Returns:
        the float16s ``(blocks,)`` and the whole numbers like ``values``.
    """
    peak = signed_peak(values)
    ends = [end for end in limits if end]
    best_scale, best_error = peak, torch.full_like(peak, float("inf"))
    for end in ends:
        for divisor in divisors:
            inverse = reciprocal(peak) * (end * divisor)
            whole = (values * inverse).round_().clamp_(*limits)
            weighted = costs * whole
            scale = ratio((weighted * values).sum(0), (weighted * whole).sum(0))
            error = (costs * (values - scale * whole).square_()).sum(0)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.minimum(error, best_error)
    best_scale = to_float16(best_scale, kind).float()
    return best_scale, (values * reciprocal(best_scale)).round_().clamp_(*limits)


def _sweep(trial: Trial, state: _State, effort: Effort) -> _State:
    """Codes, whole numbers and scales improved in turn; the best state of each block."""
    best, best_error = state, torch.full_like(state.scales, float("inf"))
    for _ in range(effort.sweeps):
        state, moments, errors = _neighbours(trial, state, (-1, 1))
        error = errors.sum(0)
        better = error < best_error
        best = state.where(better, best)
        best_error = torch.minimum(error, best_error)
        state = _refit(trial, state, moments)
    state, _, errors = _neighbours(trial, state, (-1, 1))
    return state.where(errors.sum(0) < best_error, best)


def _neighbours(
    trial: Trial, state: _State, differences: tuple[int, ...]
) -> tuple[_State, Moments, Tensor]:
    """Each sub-block's best whole numbers near its own, with codes of their own."""
    kind = trial.kind
    shifts = state.shifts(kind.min_sign)
    moments = trial.moments(state.steps, shifts)
    whole_mins, errors = _whole_mins(trial, state, moments, state.whole_scales)
    state = replace(state, whole_mins=whole_mins)
    if kind.sub_scale_limits is None:
        return state, moments, errors
    middle = state.whole_scales
    for difference in differences:
        whole = (middle + difference).clamp_(*kind.sub_scale_limits)
        new_moments = trial.moments(state.scales * whole, shifts)
        whole_mins, new_errors = _whole_mins(trial, state, new_moments, whole)
        better = new_errors < errors
        moments = new_moments.where(better, moments)
        errors = torch.minimum(errors, new_errors)
        state = replace(state, whole_scales=torch.where(better, whole, state.whole_scales))
        if whole_mins is not None:
            assert state.whole_mins is not None
            state = replace(state, whole_mins=torch.where(better, whole_mins, state.whole_mins))
    return state, moments, errors


def _whole_mins(
    trial: Trial, state: _State, moments: Moments, whole_scales: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The best whole minimums for given codes and steps, and the errors with them."""
    kind = trial.kind
    steps = state.scales * whole_scales
    if state.mins is None:
        return None, trial.error(moments, steps, None)
    whole = state.whole_mins
    assert whole is not None
    if kind.sub_min_limit is not None:
        wanted = trial.best_shifts(moments, steps) * kind.min_sign
        whole = (wanted * reciprocal(state.mins)).round_().clamp_(0, kind.sub_min_limit)
    return whole, trial.error(moments, steps, kind.min_sign * state.mins * whole)


def _refit(trial: Trial, state: _State, moments: Moments) -> _State:
    """Scales and minimums of least error for given codes and whole numbers."""
    whole = state.whole_scales
    level_2 = (whole * whole * moments.level_2).sum(0)
    level_x = (whole * moments.level_x).sum(0)
    if state.mins is None:
        return replace(state, scales=_stored(ratio(level_x, level_2), state.scales))
    assert state.whole_mins is not None and moments.level is not None
    signed = trial.kind.min_sign * state.whole_mins
    level = (whole * signed * moments.level).sum(0)
    ones = (signed * signed * trial.sum_weights).sum(0)
    sum_x = (signed * trial.sum_x).sum(0)
    product = level_2 * ones
    determinant = product - level * level
    sound = determinant > _SINGULAR * product
    safe = torch.where(sound, determinant, 1.0)
    scales = _stored((ones * level_x - level * sum_x) / safe, state.scales)
    scales = torch.where(sound, scales, state.scales)
    # Given the scale as stored.
    mins = _stored(ratio(sum_x - scales * level, ones), state.mins)
    return replace(state, scales=scales, mins=torch.where(ones > 0, mins, state.mins))


def _stored(values: Tensor, instead: Tensor) -> Tensor:
    """``values`` as float16 has them, and ``instead`` where it cannot hold them."""
    stored = through_float16(values)
    return torch.where(stored.isfinite(), stored, instead)
