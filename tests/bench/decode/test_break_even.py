"""The sentence that says above which batch a setting stops paying, where that was measured."""

from __future__ import annotations

import pytest
from bench.decode.made_rows import made_report, made_row

from llmopt.bench.decode.break_even import (
    break_even_curves,
    break_even_sentence,
    sentences,
    standings,
)


def int4_sentence(*ratios: float, width: float = 0.01) -> str:
    rows = []
    for batch, ratio in zip((1, 4, 16), ratios, strict=False):
        rows.append(made_row(100.0 * batch, width, batch=batch))
        rows.append(made_row(100.0 * batch * ratio, width, batch=batch, weights="int4"))
    (curve,) = break_even_curves(made_report(*rows))
    return break_even_sentence(curve)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((2.0, 1.5, 0.8), "do not enable int4 weights above batch 4 at a context of 128"),
        ((2.0, 0.9, 0.8), "do not enable int4 weights above batch 1 at a context of 128"),
        ((2.0, 1.5, 1.2), "faster at every batch measured"),
        ((2.0, 1.5, 1.0), "slower at no batch measured"),
        ((0.9, 0.8, 0.7), "do not enable int4 weights for speed at a context of 128"),
        ((0.9, 1.2, 1.5), "do not enable int4 weights below batch 4"),
        ((1.5, 0.8, 1.5), "slower at some batches and not at others"),
    ],
)
def test_the_sentence_follows_what_was_measured(ratios: tuple[float, ...], said: str) -> None:
    sentence = int4_sentence(*ratios)
    assert said in sentence
    for batch, ratio in zip((1, 4, 16), ratios, strict=True):
        assert f"{ratio:.2f} x at batch {batch}" in sentence


def test_a_difference_within_the_spread_is_none() -> None:
    assert "slower at no batch" in int4_sentence(0.95, 0.95, 0.95, width=0.1)
    assert "for speed" in int4_sentence(0.95, 0.95, 0.95, width=0.01)


def test_every_setting_is_compared_with_the_same_without_it() -> None:
    rates = {("16-bit", "16-bit"): 100, ("int4", "16-bit"): 200, ("16-bit", "int8"): 80}
    rates[("int4", "int8")] = 120
    rows = [made_row(rate, weights=weights, kv=kv) for (weights, kv), rate in rates.items()]
    found = {
        curve.setting: round(curve.points[0].ratio, 2)
        for curve in break_even_curves(made_report(*rows))
    }
    assert found == {
        "int4 weights": 2.0,
        "the int8 cache": 0.8,
        "int4 weights (with an int8 cache)": 1.5,
        "the int8 cache (with int4 weights)": 0.6,
    }


def test_nothing_is_said_of_what_was_not_measured() -> None:
    failed = made_row(1.0, status="failed", timing=None)
    assert sentences(made_report(failed, made_row(100.0, weights="int4"))) == []


def test_llmopt_stands_beside_the_fastest_way_of_transformers() -> None:
    theirs = {"engine": "transformers", "workload": "1x128"}
    mixed = {"engine": "transformers", "batch": 16, "context": None}
    report = made_report(
        made_row(100.0),
        made_row(700.0, batch=16),
        made_row(50.0, variant="dynamic", **theirs),
        made_row(80.0, variant="static", **theirs),
        made_row(600.0, batch=16, context=None),
        made_row(150.0, variant="sequential", **mixed),
        made_row(300.0, variant="dynamic", **mixed),
        made_row(400.0, variant="continuous", **mixed),
    )
    scaling, single, sequential, together = standings(report)
    assert "batch 16 decodes 7.00 x" in scaling
    assert "1.25 x" in single and "transformers (static)" in single
    assert "4.00 x" in sequential and "sequential generate" in sequential
    assert "1.50 x" in together and "continuous batching" in together and "of 2" in together
