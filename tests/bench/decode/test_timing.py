"""Rates and latencies of moments that are known."""

from __future__ import annotations

import pytest

from llmopt.bench.decode.timing import decode_rate, percentile, summarise, whole_rate

# Two requests; the second prompt is read at 2 s, when the first has three tokens.
TIMES = [[1.0, 1.5, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]


def test_a_decode_rate_counts_from_the_last_first_token() -> None:
    assert decode_rate(TIMES) == pytest.approx(4 / 2)


def test_a_whole_rate_counts_from_the_start() -> None:
    assert whole_rate(TIMES) == pytest.approx(8 / 4)


def test_percentiles_are_of_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([7.0], 99) == 7


def test_a_summary_is_over_runs_and_all_gaps() -> None:
    faster = [[moment / 2 for moment in request] for request in TIMES]
    timing = summarise([TIMES, faster])
    assert timing.tokens_per_s.p50 == pytest.approx(3.0)
    assert timing.first_token_s.p50 == pytest.approx((1.5 + 0.75) / 2)
    assert timing.inter_token_p50_s == 0.5
    assert timing.inter_token_p99_s == 1.0
    assert summarise([TIMES], whole=True).tokens_per_s.p50 == pytest.approx(2.0)
