import pytest
import torch
from quantization.ggml.samples import sample

from llmopt.quantization.ggml.columns import signed_peak, to_columns
from llmopt.quantization.ggml.moments import Trial
from llmopt.quantization.ggml.types import GGML_TYPES

BLOCK_TYPES = [kind for kind in GGML_TYPES.values() if not kind.is_plain]


def problem(kind):
    x = to_columns(sample("gaussian", 3, 512), kind)
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    trial = Trial(x, weights, kind)
    steps = (x.amax(0) - x.amin(0)) / kind.max_code * 1.1
    if kind.codebook is not None:
        steps = x.abs().amax(0) / 127
    return trial, steps, x.amin(0) if kind.min_sign else None


def direct_error(trial, codes, steps, shifts):
    levels = trial.kind.levels().double()[codes.long()]
    values = levels * steps.double()
    if shifts is not None:
        values += shifts.double()
    return ((values - trial.x.double()).square() * trial.weights.double()).sum(0)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_the_error_by_moments_is_the_error(kind):
    trial, steps, shifts = problem(kind)
    codes = trial.codes(steps, shifts).clone()
    assert int(codes.max()) <= kind.max_code and int(codes.min()) >= 0
    moments = trial.moments(steps, shifts)
    for factor in (1.0, 1.05):
        moved = None if shifts is None else shifts * factor
        found = trial.error(moments, steps * factor, moved)
        expected = direct_error(trial, codes, steps * factor, moved)
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_codes_are_the_nearest(kind):
    trial, steps, shifts = problem(kind)
    found = kind.levels()[trial.codes(steps, shifts).long()] * steps
    points = kind.levels().view(-1, 1, 1, 1) * steps
    if shifts is not None:
        found, points = found + shifts, points + shifts
    nearest = (points - trial.x).abs().amin(0)
    torch.testing.assert_close((found - trial.x).abs(), nearest, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [k for k in BLOCK_TYPES if k.min_sign], ids=lambda k: k.name)
def test_no_grid_near_the_best_has_less_error(kind):
    trial, steps, shifts = problem(kind)
    codes = trial.codes(steps, shifts).clone()
    moments = trial.moments(steps, shifts)
    best = trial.best_grid(moments, shift_limit=float("inf"))
    least = direct_error(trial, codes, *best)
    for by_step, by_shift in ((0.01, 0), (-0.01, 0), (0, 0.05), (0, -0.05), (0.01, -0.05)):
        other = best[0] * (1 + by_step), best[1] + by_shift * best[0]
        assert bool((direct_error(trial, codes, *other) > least).all())


@pytest.mark.parametrize("kind", [k for k in BLOCK_TYPES if k.min_sign], ids=lambda k: k.name)
def test_shifts_can_be_kept_from_being_positive(kind):
    drawn, _, _ = problem(kind)
    trial = Trial(drawn.x.abs() + 0.05, drawn.weights, kind)
    steps = trial.x.amax(0) / kind.max_code
    codes = trial.codes(steps, torch.zeros_like(steps)).clone()
    moments = trial.moments(steps, torch.zeros_like(steps))
    free = trial.best_grid(moments, shift_limit=float("inf"))
    best_steps, shifts = trial.best_grid(moments, shift_limit=0.0)
    positive = free[1] > 0
    assert bool(positive.any()) and bool((shifts[positive] == 0).all())
    least = direct_error(trial, codes, best_steps, shifts)[positive]
    for factor in (0.99, 1.01):
        other = direct_error(trial, codes, best_steps * factor, shifts)[positive]
        assert bool((other > least).all())


def test_of_equal_magnitudes_the_first_is_the_peak():
    values = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 2.0, 0.0], [0.5, 0.0, 0.0]])
    assert signed_peak(values).tolist() == [1.0, -2.0, 0.0]
