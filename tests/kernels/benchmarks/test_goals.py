"""Goals are data; they name rows that the suite gives."""

from dataclasses import replace

import pytest
from support.kernels_benchmarks import row

from benchmarks import suite
from benchmarks.benchmark import OURS
from benchmarks.goals import GOALS, Goal, Reference, evaluate

OVER = Goal("ours over theirs", 2.0, Reference("op", "case"), Reference("op", "case", "theirs"))
SHARE = Goal("share of the ceiling", 0.85, Reference("op", "case"))


@pytest.mark.parametrize(("theirs_ms", "outcome"), [(2.0, "met"), (1.99, "missed")])
def test_a_speed_is_their_time_over_ours(theirs_ms, outcome):
    rows = [row(), row(implementation="theirs", p50_ms=theirs_ms)]
    (result,) = evaluate(rows, [OVER])
    assert (result.found, result.outcome) == (theirs_ms, outcome)


@pytest.mark.parametrize(("share", "outcome"), [(0.85, "met"), (0.84, "missed")])
def test_a_share_is_of_the_ceiling(share, outcome):
    (result,) = evaluate([row(fraction_of_ceiling=share)], [SHARE])
    assert (result.found, result.outcome) == (share, outcome)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no row op/case, llmopt"),
        ([row()], "no row op/case, theirs"),
        ([row(), row(implementation="theirs", status="unavailable", reason="no cuDNN")],
         "op/case, theirs: unavailable: no cuDNN"),
        ([row(status="failed", reason="wrong"), row(implementation="theirs")], "failed: wrong"),
    ],
)  # fmt: skip
def test_without_its_rows_a_goal_is_unmeasured_and_says_why(rows, words):
    (result,) = evaluate(rows, [OVER])
    assert result.outcome == "unmeasured" and result.found is None and words in result.reason


def test_without_a_ceiling_a_share_is_unmeasured():
    (result,) = evaluate([replace(row(), fraction_of_ceiling=None)], [SHARE])
    assert (result.outcome, result.reason) == ("unmeasured", "its ceiling was not measured")


def test_every_goal_names_rows_of_the_suite_which_come_first():
    problems = {(b.operation, b.name): b for b in suite.benchmarks(suite.OPERATIONS, "real")}
    for goal in GOALS:
        for reference in goal.references():
            benchmark = problems[reference.operation, reference.benchmark]
            assert reference.implementation in (OURS, *benchmark.peers), reference
            assert benchmark.priority == 0, reference
