import math

import pytest

from llmopt.report import verdict_view
from llmopt_evals.verdict import NoiseBound


def _replace(verdict, which, /, **changes):
    criteria = [
        item.model_copy(update=changes) if item.name == which else item for item in verdict.criteria
    ]
    return verdict.model_copy(update={"criteria": tuple(criteria)})


def _scaled(verdict):
    return {item.label: item for item in verdict_view.intervals(verdict)}


def test_margins_line_up_whichever_way_is_better(make_verdict):
    scaled = _scaled(make_verdict("pass"))
    ratio, top = scaled["Perplexity ratio"], scaled["Top-1 agreement"]
    assert ratio.estimate == pytest.approx(0.0213 / 0.08)
    assert (ratio.low, ratio.high) == pytest.approx((0.0189 / 0.08, 0.0241 / 0.08))
    assert top.estimate == pytest.approx((1 - 0.9412) / 0.14)
    assert (top.low, top.high) == pytest.approx(((1 - 0.944) / 0.14, (1 - 0.9382) / 0.14))


@pytest.mark.parametrize("outcome", ["pass", "fail", "inconclusive"])
def test_an_interval_lies_beyond_one_exactly_when_its_criterion_does_not_pass(
    make_verdict, outcome
):
    for item in verdict_view.intervals(make_verdict(outcome)):
        assert (item.high <= 1) == (item.outcome == "pass")
        assert (item.low > 1) == (item.outcome == "fail")


def test_the_relative_criterion_is_lossless_at_no_divergence(make_verdict):
    verdict = make_verdict("pass")
    baseline = verdict.summary.baseline_mean_kl
    item = _scaled(verdict)["KL above plain rounding's"]
    assert item.estimate == pytest.approx((baseline - 0.0123) / baseline)


def test_where_only_the_noise_arm_passes_its_numbers_are_shown(make_verdict):
    bound = NoiseBound(estimate=2e-7, low=1e-7, high=3e-7, bound=6e-7, outcome="pass")
    verdict = _replace(
        make_verdict("pass"), "kl_above_baseline", estimate=1e-8, high=2e-8, noise_bound=bound
    )
    row = verdict_view.criterion_rows(verdict)[-1]
    assert row.label == "Mean KL against the noise floor"
    assert (row.estimate, row.high, row.margin) == (2e-7, 3e-7, 6e-7)
    both = _replace(make_verdict("pass"), "kl_above_baseline", noise_bound=bound)
    assert verdict_view.criterion_rows(both)[-1].label == "KL above plain rounding's"


def test_the_sentence_names_the_criterion_furthest_off(make_verdict):
    assert verdict_view.sentence(make_verdict("pass")).startswith("All 6 criteria hold")
    failed = verdict_view.sentence(make_verdict("fail"))
    assert failed.startswith("Perplexity ratio: 3.870 (3.710 to 4.020), where at most 1.08")
    assert failed.endswith("5 of 6 criteria fail.")
    worse = _replace(make_verdict("fail"), "mean_kl", estimate=math.inf)
    assert verdict_view.sentence(worse).startswith("Mean KL divergence: ∞")


def test_an_undecided_verdict_says_how_much_text_would_settle_it(make_verdict):
    verdict = make_verdict("inconclusive")
    assert "about 240 would settle it" in verdict_view.sentence(verdict)
    hopeless = _replace(verdict, "p99_kl", units_for_power=None)
    assert "more text would hardly make it pass" in verdict_view.sentence(hopeless)


def test_a_task_is_named(make_verdict):
    verdict = _replace(make_verdict("pass"), "mean_kl", name="task_accuracy_drop:arc_easy")
    assert verdict_view.criterion_rows(verdict)[1].label == "Accuracy lost, arc_easy"


def test_levels_come_from_the_summary(make_verdict):
    verdict = make_verdict("pass")
    perplexity, cloze = verdict_view.comparisons(verdict)
    assert perplexity.artifact == verdict.summary.candidate_perplexity
    assert (cloze.source, cloze.is_share) == (0.812, True)
    without = verdict.summary.model_copy(update={"reference_cloze_accuracy": None})
    alone = verdict.model_copy(update={"summary": without})
    assert len(verdict_view.comparisons(alone)) == 1
