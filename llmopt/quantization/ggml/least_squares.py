"""Block types by weighted least squares: less error than llama.cpp's search for the same bytes.

What is made small is ``sum h (w - q)^2`` itself, ``h`` the importance of a column:

1. Each sub-block on its own: codes are tried on grids of several widths (of both directions where
   levels are not symmetric), the least squares step and shift of each are compared, and the best is
   encoded anew on its own grid a few times.
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
from llmopt.quantization.ggml.moments import Moments, Trial
from llmopt.quantization.ggml.types import GGMLType

_SINGULAR = 3e-6


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried.

    Attributes:
        widths: levels that the range of a sub-block is spread over, in parts of those there are:
            above 1 the outermost are clipped.
        both_directions: try the largest value at either end of the levels.
        refits: times the best grid of a sub-block is encoded anew, in types without minimum.
        moves: how far the ends of a range are moved from the best so far, in parts of a step, in
            types with a minimum.
        divisors: what ``d`` times them is the largest step, in parts of the largest whole number.
        sweeps: over whole blocks.
    """

    widths: tuple[float, ...]
    both_directions: bool = False
    refits: int = 1
    moves: tuple[float, ...] = ()
    divisors: tuple[float, ...] = (1.0,)
    sweeps: int = 2


def _even(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * index / (count - 1) for index in range(count))


_FINE = _even(0.98, 1.06, 9)
_COARSE = _even(0.9, 1.5, 25)
_MOVE_SIZES = (1.0, 0.6, 0.4, 0.25)

EFFORTS = {
    "Q8_0": Effort(_even(0.995, 1.01, 4), sweeps=2),
    "Q4_0": Effort(_even(0.92, 1.2, 8), sweeps=2),
    "Q5_0": Effort(_even(0.95, 1.12, 8), sweeps=2),
    "Q4_1": Effort((1.0, 1.15), moves=_MOVE_SIZES, sweeps=3),
    "Q5_1": Effort((1.0, 1.08), moves=_MOVE_SIZES, sweeps=3),
    "Q2_K": Effort((1.0, 1.3), moves=_MOVE_SIZES, divisors=_COARSE, sweeps=4),
    "Q3_K": Effort(_even(0.85, 1.4, 10), True, refits=2, divisors=_COARSE, sweeps=3),
    "Q4_K": Effort((1.0, 1.15), moves=_MOVE_SIZES, divisors=_FINE, sweeps=3),
    "Q5_K": Effort((1.0, 1.08), moves=_MOVE_SIZES, divisors=_FINE, sweeps=3),
    "Q6_K": Effort(_even(0.97, 1.06, 8), refits=1, divisors=_FINE, sweeps=2),
    "IQ4_NL": Effort(_even(0.92, 1.25, 10), True, refits=2, sweeps=3),
    "IQ4_XS": Effort(_even(0.92, 1.25, 10), True, refits=2, divisors=_FINE, sweeps=3),
}


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
    if kind.min_sign:
        moments, steps = _fit_ranges(trial, effort)
        state = _share_with_minimum(trial, moments, steps, effort)
    else:
        moments, steps = _fit_peaks(trial, effort)
        state = _share(moments, steps, kind, effort)
    state = _sweep(trial, state, effort)
    codes = trial.codes(state.steps, state.shifts(kind.min_sign))
    cut = kind.sub_scale_limits is not None
    return Found(
        codes,
        state.scales,
        state.whole_scales if cut else None,
        state.mins,
        state.whole_mins if cut else None,
    )


def _fit_peaks(trial: Trial, effort: Effort) -> tuple[Moments, Tensor]:
    """Moments and steps of each sub-block on its own, in types without minimum."""
    levels = trial.kind.levels()
    ends = [float(levels[0]), float(levels[-1])]
    inverse_peak = reciprocal(signed_peak(trial.x))
    best: Moments | None = None
    gain = inverse_peak
    for end in ends if effort.both_directions else ends[:1]:
        for width in effort.widths:
            moments = trial.moments_of_inverse(inverse_peak * (end * width), None)
            new_gain = moments.level_x * ratio(moments.level_x, moments.level_2)
            if best is None:
                best, gain = moments, new_gain
            else:
                best = moments.where(new_gain > gain, best)
                gain = torch.maximum(gain, new_gain)
    assert best is not None
    for _ in range(effort.refits):
        moments = trial.moments(ratio(best.level_x, best.level_2), None)
        new_gain = moments.level_x * ratio(moments.level_x, moments.level_2)
        best = moments.where(new_gain > gain, best)
        gain = torch.maximum(gain, new_gain)
    return best, ratio(best.level_x, best.level_2)


def _shift_limit(kind: GGMLType) -> float:
    """Sub-blocks share the sign of their minimums; where blocks are not cut any will do."""
    return float("inf") if kind.sub_min_limit is None else 0.0


def _fit_ranges(trial: Trial, effort: Effort) -> tuple[Moments, Tensor]:
    """The same in types with a minimum."""
    max_code, limit = trial.kind.max_code, _shift_limit(trial.kind)
    lowest = trial.x.amin(0).clamp_(max=limit)
    span = trial.x.amax(0) - lowest
    fit: _Fit | None = None
    for width in effort.widths:
        # The middle of the range stays where it is.
        fit = _better(trial, fit, span / (max_code * width), lowest + span * (0.5 - 0.5 / width))
    assert fit is not None
    for size in effort.moves:
        for bottom, top in _MOVES:
            steps = fit.steps * (1 + (top - bottom) * size / max_code)
            fit = _better(trial, fit, steps, fit.shifts + fit.steps * (bottom * size))
    return fit.moments, fit.steps


# Where the two ends of a range move, in parts of a step: one of them, both, apart, together.
_MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (-1, 1), (1, -1))


@dataclass(frozen=True, slots=True)
class _Fit:
    """Codes of each sub-block with the grid of least error for them and that error."""

    moments: Moments
    steps: Tensor
    shifts: Tensor
    error: Tensor


def _better(trial: Trial, fit: _Fit | None, steps: Tensor, shifts: Tensor) -> _Fit:
    """``fit``, or where it is better what comes of the codes nearest on another grid."""
    limit = _shift_limit(trial.kind)
    moments = trial.moments(steps, shifts.clamp(max=limit))
    steps, shifts = trial.best_grid(moments, shift_limit=limit)
    error = trial.error(moments, steps, shifts)
    if fit is None:
        return _Fit(moments, steps, shifts, error)
    better = error < fit.error
    return _Fit(
        moments.where(better, fit.moments),
        torch.where(better, steps, fit.steps),
        torch.where(better, shifts, fit.shifts),
        torch.minimum(error, fit.error),
    )


def _share(moments: Moments, steps: Tensor, kind: GGMLType, effort: Effort) -> _State:
    """Steps as whole multiples of one scale a block."""
    if kind.sub_scale_limits is None:
        return _State(to_float16(steps.squeeze(0), kind).float(), torch.ones_like(steps))
    return _State(*_whole(steps, moments.level_2, kind.sub_scale_limits, kind, effort))


def _share_with_minimum(trial: Trial, moments: Moments, steps: Tensor, effort: Effort) -> _State:
    kind = trial.kind
    assert moments.level is not None
    if kind.sub_scale_limits is None:
        state = _share(moments, steps, kind, effort)
        shifts = trial.best_shifts(moments, state.steps)
        return replace(
            state,
            mins=to_float16(shifts.squeeze(0), kind).float() * kind.min_sign,
            whole_mins=torch.ones_like(steps),
        )
    assert kind.sub_min_limit is not None
    # What a step costs once the minimum has followed it.
    costs = moments.level_2 - moments.level * ratio(moments.level, trial.sum_weights)
    state = _State(*_whole(steps, costs.clamp_(min=0), kind.sub_scale_limits, kind, effort))
    minimums = trial.best_shifts(moments, state.steps).neg_().clamp_(min=0)
    mins, whole = _whole(minimums, trial.sum_weights, (0, kind.sub_min_limit), kind, effort)
    return replace(state, mins=mins, whole_mins=whole)


def _whole(
    values: Tensor, costs: Tensor, limits: tuple[int, int], kind: GGMLType, effort: Effort
) -> tuple[Tensor, Tensor]:
    """``values (sub_blocks, blocks)`` as a float16 times whole numbers within ``limits``.

    Returns:
        the float16s ``(blocks,)`` and the whole numbers like ``values``.
    """
    peak = signed_peak(values)
    ends = [end for end in limits if end]
    best_scale, best_error = peak, torch.full_like(peak, float("inf"))
    for end in ends:
        for divisor in effort.divisors:
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
        state, moments, errors = _neighbours(trial, state)
        error = errors.sum(0)
        better = error < best_error
        best = state.where(better, best)
        best_error = torch.minimum(error, best_error)
        state = _refit(trial, state, moments)
    state, _, errors = _neighbours(trial, state)
    return state.where(errors.sum(0) < best_error, best)


def _neighbours(trial: Trial, state: _State) -> tuple[_State, Moments, Tensor]:
    """Each sub-block's best whole numbers near its own, with codes of their own."""
    kind = trial.kind
    shifts = state.shifts(kind.min_sign)
    moments = trial.moments(state.steps, shifts)
    whole_mins, errors = _whole_mins(trial, state, moments, state.whole_scales)
    state = replace(state, whole_mins=whole_mins)
    if kind.sub_scale_limits is None:
        return state, moments, errors
    middle = state.whole_scales
    for difference in (-1, 1):
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
