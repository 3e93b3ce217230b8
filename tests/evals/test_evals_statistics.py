import math

import numpy as np
import pytest
from scipy import stats

from llmopt_evals.statistics import (
    MIN_TAIL_REPLICATES,
    NUM_RESAMPLES,
    alpha_spending,
    power_at,
    quantile_interval,
    ratio_interval,
    resample_counts,
    units_needed,
)


def test_coverage_of_a_skewed_ratio() -> None:
    rng = np.random.default_rng(0)
    sigma, n, repeats = 0.5, 60, 1200
    counts = resample_counts(n, 1500, seed=1)
    truth, above, below = math.exp(sigma**2 / 2), 0, 0
    for _ in range(repeats):
        tokens = rng.integers(256, 2000, size=n).astype(float)
        interval = ratio_interval(tokens * rng.lognormal(0, sigma, n), tokens, counts, 0.05)
        above += truth > interval.high
        below += truth < interval.low
    assert above / repeats < 0.05, "a worse model would pass too often (2.5 % nominal)"
    assert 0.92 < 1 - (above + below) / repeats < 0.975


def test_coverage_of_a_quantile() -> None:
    rng = np.random.default_rng(2)
    n, size, repeats = 50, 100, 120
    counts = resample_counts(n, 600, seed=3)
    units = np.repeat(np.arange(n, dtype=np.int32), size)
    population = rng.lognormal(0, 0.3, 200_000) * rng.exponential(1.0, 200_000)
    truth, missed = float(np.quantile(population, 0.99)), 0
    for _ in range(repeats):
        scale = np.repeat(rng.lognormal(0, 0.3, n), size)
        values = (scale * rng.exponential(1.0, n * size)).astype(np.float32)
        interval = quantile_interval(values, units, counts, 0.05)
        missed += not interval.low <= truth <= interval.high
    assert 0.005 < missed / repeats < 0.11


def test_quantile_estimate_is_weighted_by_tokens() -> None:
    values = np.arange(1, 1001, dtype=np.float32)
    units = np.repeat(np.arange(40, dtype=np.int32), 25)
    interval = quantile_interval(values, units, resample_counts(40, 500, 0), 0.05)
    assert interval.estimate == 990.0  # ten of a thousand lie above
    assert interval.low < 990.0 <= interval.high


def test_ratio_is_weighted_and_symmetric_data_gives_students_interval() -> None:
    rng = np.random.default_rng(5)
    change, tokens = rng.normal(size=400), np.full(400, 3.0)
    interval = ratio_interval(change, tokens, resample_counts(400, 8000, 0), 0.05)
    assert interval.estimate == pytest.approx(change.mean() / 3)
    error = change.std(ddof=1) / 20 / 3
    assert interval.standard_error == pytest.approx(error)
    assert interval.high - interval.low == pytest.approx(2 * 1.966 * error, rel=0.05)
    uneven = ratio_interval(
        np.array([0.0] * 20 + [10.0] * 20),
        np.array([1.0] * 20 + [9.0] * 20),
        resample_counts(40, 500, 0),
        0.05,
    )
    assert uneven.estimate == 1.0


def test_no_difference_is_a_point() -> None:
    interval = ratio_interval(np.zeros(30), np.ones(30), resample_counts(30, 100, 0), 0.05)
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_a_single_unit_that_differs_gives_a_finite_interval() -> None:
    change = np.zeros(30)
    change[4] = 1.0
    interval = ratio_interval(change, np.full(30, 50.0), resample_counts(30, 2000, 0), 0.01)
    assert 0 < interval.high < 20 * interval.estimate


@pytest.mark.parametrize("fractions", [[1.0], [0.5, 1.0], [0.3, 0.5, 0.8, 1.0]])
def test_alpha_is_spent_whole(fractions: list[float]) -> None:
    increments = alpha_spending(fractions, 0.05)
    assert sum(increments) == pytest.approx(0.05, abs=1e-12)


def test_later_looks_spend_as_o_brien_and_fleming() -> None:
    first, second, last = alpha_spending([0.6, 0.8, 1.0], 0.05)
    spent = [2 * stats.norm.sf(stats.norm.isf(0.025) / math.sqrt(part)) for part in (0.6, 0.8)]
    assert first == pytest.approx(spent[0])
    assert second == pytest.approx(spent[1] - spent[0])
    assert last == pytest.approx(0.05 - spent[1])


@pytest.mark.parametrize("looks", [1, 2, 3, 4])
def test_every_tail_holds_enough_replicates(looks: int) -> None:
    alphas = alpha_spending([look / looks for look in range(1, looks + 1)], 0.05)
    assert len(alphas) == looks
    assert sum(alphas) == pytest.approx(0.05, abs=1e-12)
    replicates = np.arange(NUM_RESAMPLES, dtype=np.float64)
    for alpha in alphas:
        for level in (alpha, alpha / 2):  # a criterion with two arms tests each at half
            low, high = np.quantile(replicates, [level / 2, 1 - level / 2])
            assert np.sum(replicates <= low) >= MIN_TAIL_REPLICATES >= 20
            assert np.sum(replicates >= high) >= MIN_TAIL_REPLICATES


def test_too_little_alpha_is_shared_equally_at_least() -> None:
    alphas = alpha_spending([0.25, 0.5, 0.75, 1.0], 0.01)
    assert sum(alphas) == pytest.approx(0.01, abs=1e-12)
    assert alphas == pytest.approx([0.0025] * 4)


def test_units_needed_give_the_power() -> None:
    units = units_needed(0.02, 0.08, standard_error=0.03, num_units=50, alpha=0.05, power=0.9)
    assert units is not None
    at = [power_at(0.02, 0.08, 0.03 * math.sqrt(50 / n), 0.05) for n in (units, units - 1)]
    assert at[0] >= 0.9 > at[1]
    assert units_needed(0.08, 0.08, 0.03, 50, 0.05) is None
    assert power_at(0.01, 0.08, 0.0, 0.05) == 1.0
