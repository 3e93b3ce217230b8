"""Tuning: candidates stand where peers stood; the winner is written down."""

from support.kernels_benchmarks import ENVIRONMENT, bench, double, row

from benchmarks.benchmark import Prepared, Tunable
from benchmarks.measuring import measure
from benchmarks.tune import notes, tunings, winners


def make(i, config):
    if config == "too large":
        raise RuntimeError("out of resource: shared memory")
    return Prepared(lambda: (2 if config != "wrong" else 2.000003) * i.x)


TUNABLE = Tunable(["shipped", "other", "too large", "wrong", "other"], "shipped", make)
PEERS = {"torch": lambda i: Prepared(lambda: 2 * i.x)}


def test_every_candidate_is_checked_and_timed_once():
    (problem,) = tunings([double(tunable=TUNABLE, peers=PEERS), double("fixed")])
    rows = {r.implementation: r for r in measure(problem, bench())}
    assert list(rows) == ["llmopt", "other", "too large", "wrong"]
    assert rows["other"].status == "measured"
    assert rows["too large"].reason == "RuntimeError: out of resource: shared memory"
    assert rows["wrong"].status == "unavailable"


def test_the_fastest_wins_and_the_page_says_by_how_much():
    problems = tunings([double("case", tunable=TUNABLE), double("unmeasured", tunable=TUNABLE)])
    rows = [
        row(p50_ms=3.0),
        row(implementation="other", p50_ms=2.0),
        row(implementation="too large", status="unavailable", p50_ms=None),
    ]
    (winner,) = winners(problems, rows)
    assert (winner.shipped, winner.shipped_ms) == ("shipped", 3.0)
    assert (winner.fastest, winner.fastest_ms) == ("other", 2.0)
    assert (winner.num_measured, winner.num_refused) == (2, 1)
    page = notes(ENVIRONMENT, [winner])
    assert "| op | case | shipped | 3.0000 | other | 2.0000 | 1.50 | 2 | 1 |" in page


def test_where_nothing_ran_nothing_wins():
    (problem,) = tunings([double("case", tunable=TUNABLE)])
    (winner,) = winners([problem], [row(status="failed", p50_ms=None)])
    assert winner.fastest == "none" and winner.fastest_ms is None
    assert "| none |  |  | 0 | 1 |" in notes(ENVIRONMENT, [winner])
