from itertools import pairwise

import pytest

from llmopt_evals.criteria import (
    BETTER,
    CACHE_METRICS,
    Criteria,
    default_criteria,
    judge,
    judge_all,
    judge_either,
    parse_criteria,
)
from llmopt_evals.errors import EvaluationError
from llmopt_evals.statistics import Interval

JUST_ABOVE = 0.08000000000000002


@pytest.mark.parametrize(
    ("low", "high", "better", "outcome"),
    [
        (0.01, 0.08, "lower", "pass"),
        (0.01, JUST_ABOVE, "lower", "inconclusive"),
        (0.08, 0.2, "lower", "inconclusive"),
        (JUST_ABOVE, 0.2, "lower", "fail"),
        (0.08, 0.9, "higher", "pass"),
        (0.07999, 0.9, "higher", "inconclusive"),
        (0.01, 0.08, "higher", "inconclusive"),
        (0.01, 0.07999, "higher", "fail"),
    ],
)
def test_intervals_are_judged_unrounded(low: float, high: float, better, outcome: str) -> None:
    assert judge(Interval((low + high) / 2, low, high, 0.01), 0.08, better) == outcome


def test_unions_and_intersections() -> None:
    assert judge_all(["pass", "pass"]) == "pass"
    assert judge_all(["pass", "inconclusive"]) == "inconclusive"
    assert judge_all(["inconclusive", "fail", "pass"]) == "fail"
    assert judge_either(["fail", "pass"]) == "pass"
    assert judge_either(["fail", "fail"]) == "fail"
    assert judge_either(["fail", "inconclusive"]) == "inconclusive"


def test_margins_loosen_as_bits_go_down() -> None:
    margins = [
        {c.metric: c.margin for c in default_criteria(bits).criteria} for bits in (8, 6, 5, 4, 3, 2)
    ]
    for wide, narrow in pairwise(margins):
        assert (
            wide.keys()
            == narrow.keys()
            == BETTER.keys()
            - {
                "task_accuracy_drop",
                *CACHE_METRICS,
            }
        )
        for metric, margin in wide.items():
            sign = 1 if BETTER[metric] == "lower" else -1
            assert sign * margin < sign * narrow[metric]
    with pytest.raises(EvaluationError, match="7 bits"):
        default_criteria(7)


def criteria_data(**changes: object) -> dict[str, object]:
    return {"criteria": [{"metric": "mean_kl", "margin": 0.1, **changes}]}


def test_data_round_trips() -> None:
    criteria = parse_criteria(criteria_data(better="lower"))
    assert Criteria.model_validate_json(criteria.model_dump_json()) == criteria


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        (criteria_data(margn=1), "margn", "'margin'"),
        (criteria_data(metric="perplexity_ration"), "metric", "'perplexity_ratio'"),
        ({**criteria_data(), "confidense": 0.9}, "confidense", "'confidence'"),
        (criteria_data(better="higher"), "mean_kl is better when lower", ""),
        (criteria_data(task="arc"), "task_accuracy_drop", ""),
        (criteria_data(margin=float("nan")), "margin", ""),
        ({"criteria": []}, "criteria", ""),
        ({"criteria": criteria_data()["criteria"] * 2}, "given twice: mean_kl", ""),
        ({**criteria_data(), "looks": 5}, "looks", ""),
        (criteria_data(metric="perplexity_ratio", margin=0.0), "positive", ""),
    ],
)
def test_wrong_data_is_refused(data, what: str, remedy: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        parse_criteria(data)
    assert what in caught.value.what
    assert remedy in caught.value.remedy
