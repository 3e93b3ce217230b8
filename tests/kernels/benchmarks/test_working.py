"""The measuring process: order, budget, and going on where another stopped."""

from support.kernels_benchmarks import CEILINGS, ENVIRONMENT, bench, double

from benchmarks.benchmark import Prepared
from benchmarks.journal import Journal
from benchmarks.working import estimated_s, in_order, work


def started(path):
    journal = Journal.read(path)
    journal.start(ENVIRONMENT, CEILINGS)
    return journal


def test_goals_come_first_and_the_rest_as_given():
    problems = [double("a"), double("b", priority=0), double("c", priority=2), double("d")]
    assert [b.name for b in in_order(problems)] == ["b", "a", "d", "c"]


def test_everything_measured_is_in_the_journal(tmp_path):
    journal = started(tmp_path / "journal")
    said = []
    assert work([double()], bench(), journal, 100.0, clock=lambda: 0.0, tell=said.append) == 0
    again = Journal.read(tmp_path / "journal")
    assert again.rows == journal.rows and again.rows[0].status == "measured"
    assert again.ended == ["op/double"]
    assert again.ceilings == CEILINGS and again.environment == ENVIRONMENT
    assert "p50    2.0000 ms" in said[0]


def test_what_the_time_does_not_allow_is_listed(tmp_path):
    journal = started(tmp_path / "journal")
    peers = {"torch": lambda i: Prepared(lambda: 2 * i.x)}
    quick, slow = double("quick", estimated_s=1.0), double("slow", estimated_s=50.0, peers=peers)
    work([slow, quick], bench(), journal, 30.0, clock=lambda: 0.0, tell=lambda _: None)
    slow_rows = [row for row in journal.rows if row.benchmark == "slow"]
    assert [row.implementation for row in slow_rows] == ["llmopt", "torch"]
    assert all(row.status == "left out" for row in slow_rows)
    assert slow_rows[0].reason == "would take about 51 s, 30 s were left"
    assert [row.status for row in journal.rows if row.benchmark == "quick"] == ["measured"]


def test_an_estimate_counts_every_implementation():
    peers = {"a": lambda i: None, "b": lambda i: None}
    alone, three = double(estimated_s=2.0), double(estimated_s=2.0, peers=peers)
    it = bench(seconds=0.4)
    assert estimated_s(three, it) - 2 == 3 * (estimated_s(alone, it) - 2)


def test_a_second_process_goes_on_behind_what_the_first_began(tmp_path):
    path = tmp_path / "journal"
    first = started(path)
    first.begin(double("crashed"))
    with path.open("a") as file:
        file.write('{"event": "row", "ro')  # cut off by the crash
    second = Journal.read(path)
    assert second.began == ["op/crashed"] and second.rows == []
    work([double("crashed"), double()], bench(), second, 100.0, lambda: 0.0, lambda _: None)
    third = Journal.read(path)
    assert third.began == ["op/crashed", "op/double"] and third.rows == second.rows != []


def test_what_broke_gets_its_missing_rows(tmp_path):
    journal = started(tmp_path / "journal")
    peers = {"a": lambda i: Prepared(lambda: 2 * i.x), "b": lambda i: None}
    crashed, untouched = double("crashed", peers=peers), double("untouched")
    journal.begin(crashed)
    journal.close_broken([crashed, untouched], "status -11: Segmentation fault")
    assert [(r.benchmark, r.implementation, r.status) for r in journal.rows] == [
        ("crashed", "llmopt", "failed"),
        ("crashed", "a", "unavailable"),
        ("crashed", "b", "unavailable"),
    ]
    assert journal.rows[0].reason == "status -11: Segmentation fault"
    assert journal.rows[1].reason == "not reached: status -11: Segmentation fault"
    assert journal.ended == ["op/crashed"]
