import math

import numpy as np
import pytest
import torch

from llmopt_evals.cloze import ClozeOptions
from llmopt_evals.criteria import Criteria, Criterion, RelativeCriterion, default_criteria
from llmopt_evals.errors import EvaluationError, NotFiniteError
from llmopt_evals.gate import run_gate
from llmopt_evals.judging import PairedTask, plan_looks
from llmopt_evals.power import shift_to_margin, simulate
from llmopt_evals.units import HeldOutText, cut_units
from llmopt_evals.verdict import Verdict

CLOZE = ClozeOptions(num_items=300, context_tokens=8, continuation_tokens=4)


@pytest.fixture(scope="module")
def text(documents) -> HeldOutText:
    return cut_units(documents)


def judge(*scorers: object, **options: object) -> Verdict:
    return run_gate(*scorers, **options).verdict


def only(metric: str, margin: float, **more: object) -> Criteria:
    return Criteria(criteria=(Criterion(metric=metric, margin=margin),), relative=None, **more)


def test_identical_models_pass_at_the_first_look(text, table_scorer) -> None:
    source = table_scorer()
    verdict = judge(source, table_scorer(), text=text, criteria=default_criteria(8), cloze=CLOZE)
    assert verdict.outcome == "pass" and verdict.stopped_early
    results = {result.name: result for result in verdict.criteria}
    for name, value in (("mean_kl", 0.0), ("perplexity_ratio", 1.0), ("top1_agreement", 1.0)):
        assert results[name].low == results[name].estimate == results[name].high == value
    assert "relative criterion was not judged" in " ".join(verdict.notes)


def test_a_worse_model_fails_at_the_first_look(text, table_scorer) -> None:
    worse = table_scorer(noise=4.0)
    verdict = judge(table_scorer(), worse, text=text, criteria=default_criteria(2), cloze=CLOZE)
    assert verdict.outcome == "fail" and verdict.stopped_early
    outcomes = {result.name: result.outcome for result in verdict.criteria}
    assert outcomes["mean_kl"] == outcomes["top1_agreement"] == "fail"
    # 30 units and 300 items of four branches: the second look's text was never scored.
    assert worse.num_scored == 30 + 4 * 300


def test_the_second_look_scores_only_what_is_new(text, table_scorer) -> None:
    candidate = table_scorer(noise=0.3)
    kl = judge(table_scorer(), candidate, text=text, criteria=only("mean_kl", 9.0), cloze=None)
    candidate.num_scored = 0
    verdict = judge(
        table_scorer(),
        candidate,
        text=text,
        criteria=only("mean_kl", kl.criteria[0].estimate),
        cloze=None,
    )
    assert verdict.outcome == "inconclusive"
    assert [look.num_units for look in verdict.looks] == [30, 43, 64]
    assert candidate.num_scored == 64
    assert sum(look.alpha for look in verdict.looks) == pytest.approx(0.05)
    assert verdict.num_tokens == 64 * 299


def test_estimates_are_those_of_a_direct_computation(text, table_scorer) -> None:
    source, candidate = table_scorer(), table_scorer(noise=0.5)
    run = run_gate(source, candidate, text=text, criteria=default_criteria(8), cloze=CLOZE)
    verdict, evidence = run.verdict, run.evidence
    nll, kl, n = [0.0, 0.0], 0.0, 0
    for unit in text.units:
        if unit.name not in evidence.names:
            continue
        tokens = unit.blocks[0]
        p, q = (
            model.score([tokens]).logits(0, 0, len(tokens) - 1).double().log_softmax(-1)
            for model in (source, candidate)
        )
        for i, logprobs in enumerate((p, q)):
            nll[i] -= float(logprobs.gather(1, tokens[1:, None]).sum())
        kl += float((p.exp() * (p - q)).sum())
        n += len(tokens) - 1
    results = {result.name: result for result in verdict.criteria}
    assert results["perplexity_ratio"].estimate == pytest.approx(math.exp((nll[1] - nll[0]) / n))
    assert results["mean_kl"].estimate == pytest.approx(kl / n)
    assert verdict.summary.reference_perplexity == pytest.approx(math.exp(nll[0] / n))
    assert sum(verdict.plots.kl_counts) == n
    assert sum(bucket.num_tokens for bucket in verdict.plots.positions) == n
    assert verdict.summary.reference_cloze_accuracy > 0.5


@pytest.mark.parametrize(
    ("candidate_noise", "baseline_noise", "outcome"),
    [(0.2, 0.4, "pass"), (0.4, 0.2, "fail"), (0.3, 0.3, "pass")],
)
def test_relative_to_plain_rounding(
    text, table_scorer, candidate_noise: float, baseline_noise: float, outcome: str
) -> None:
    verdict = judge(
        table_scorer(),
        table_scorer(noise=candidate_noise),
        baseline=table_scorer(noise=baseline_noise),
        text=text,
        criteria=only("mean_kl", 9.0).model_copy(update={"relative": RelativeCriterion()}),
        cloze=None,
    )
    result = verdict.criteria[-1]
    assert result.name == "kl_above_baseline"
    assert result.outcome == verdict.outcome == outcome


def test_plain_rounding_itself_is_not_scored_twice(text, table_scorer) -> None:
    candidate = table_scorer(noise=0.3)
    verdict = judge(
        table_scorer(),
        candidate,
        baseline=candidate,
        text=text,
        criteria=only("mean_kl", 9.0).model_copy(update={"relative": RelativeCriterion()}),
        cloze=None,
    )
    assert (verdict.criteria[-1].low, verdict.criteria[-1].high) == (0.0, 0.0)
    assert verdict.outcome == "pass" and candidate.num_scored == 30


@pytest.mark.parametrize(("noise", "outcome"), [(0.05, "pass"), (0.001, "fail")])
def test_below_the_noise_floor_is_good_enough(
    text, table_scorer, noise: float, outcome: str
) -> None:
    verdict = judge(
        table_scorer(),
        table_scorer(noise=0.01),
        baseline=table_scorer(noise=0.002),
        noise=table_scorer(noise=noise),
        text=text,
        criteria=only("mean_kl", 9.0).model_copy(update={"relative": RelativeCriterion()}),
        cloze=None,
    )
    relative = verdict.criteria[-1]
    assert relative.low > 0, "worse than plain rounding"
    assert verdict.outcome == relative.outcome == outcome
    assert relative.noise_bound.bound == 2 * verdict.noise_floor.mean_kl
    assert verdict.noise_floor.num_tokens == 8 * 299


def test_nan_logits_of_the_candidate(text, table_scorer) -> None:
    broken = table_scorer()
    broken.table[:, 3] = torch.nan
    with pytest.raises(NotFiniteError, match="candidate's logits are NaN") as caught:
        run_gate(table_scorer(), broken, text=text, criteria=default_criteria(4), cloze=CLOZE)
    assert caught.value.model == "candidate"


def test_what_cannot_be_judged_is_refused_before_the_work(text, table_scorer) -> None:
    source = table_scorer()
    with pytest.raises(EvaluationError, match="no cloze items"):
        run_gate(source, source, text=text, criteria=default_criteria(4), cloze=None)
    with pytest.raises(EvaluationError, match="cloze items can be made"):
        run_gate(source, source, text=text, criteria=default_criteria(4))
    criteria = Criteria(
        criteria=(Criterion(metric="task_accuracy_drop", margin=0.1, task="arc"),), relative=None
    )
    with pytest.raises(EvaluationError, match="'arc'"):
        run_gate(source, source, text=text, criteria=criteria, cloze=None)
    assert source.num_scored == 0


@pytest.mark.parametrize(("num_wrong", "outcome"), [(0, "pass"), (60, "fail")])
def test_a_task_is_one_more_criterion(text, table_scorer, num_wrong: int, outcome: str) -> None:
    right = np.ones(777, dtype=np.bool_)
    worse = right.copy()
    worse[:: 777 // num_wrong if num_wrong else 778] = False
    if not num_wrong:
        worse[:] = True
    criteria = Criteria(
        criteria=(Criterion(metric="task_accuracy_drop", margin=0.02, task="arc"),), relative=None
    )
    verdict = judge(
        table_scorer(),
        table_scorer(),
        text=text,
        criteria=criteria,
        cloze=None,
        tasks=[PairedTask("arc", right, worse)],
    )
    assert verdict.outcome == outcome
    assert verdict.criteria[0].estimate == pytest.approx((~worse).mean())


def test_a_verdict_is_json(text, table_scorer) -> None:
    verdict = judge(
        table_scorer(),
        table_scorer(noise=0.2),
        baseline=table_scorer(noise=0.3),
        noise=table_scorer(),
        text=text,
        criteria=default_criteria(4),
        cloze=CLOZE,
    )
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert "outcome" in Verdict.model_json_schema()["properties"]


def test_looks_have_thirty_units_at_least() -> None:
    assert plan_looks(200, 4) == [50, 100, 150, 200]
    assert plan_looks(101, 2) == [51, 101]
    assert plan_looks(40, 2) == [30, 40]
    assert plan_looks(30, 3) == [30]


def test_simulated_gates_pass_few_models_at_the_margin(text, table_scorer) -> None:
    criteria = default_criteria(4).model_copy(
        update={"criteria": default_criteria(4).criteria[:2], "looks": 1}
    )
    evidence = run_gate(
        table_scorer(), table_scorer(noise=0.2), text=text, criteria=criteria, cloze=CLOZE
    ).evidence
    for criterion in default_criteria(4).criteria:
        at = shift_to_margin(evidence, criterion)
        if criterion.metric == "mean_kl":
            assert at.kl.sum() / at.tokens.sum() == pytest.approx(criterion.margin)
        if criterion.metric == "top1_agreement":
            assert at.agreements.sum() / at.tokens.sum() == pytest.approx(criterion.margin)
    rows = simulate(evidence, criteria, num_gates=100, num_resamples=500)
    assert [row.criterion for row in rows] == ["perplexity_ratio", "mean_kl", "all"]
    for row in rows[:2]:
        assert row.false_pass < 0.08 and row.false_fail < 0.08
        assert row.passes + row.fails <= 1
    assert rows[1].passes > 0.95
