"""Check, then time; whatever is not measured leaves its reason."""

import re
import warnings

import pytest
import torch
from support.kernels_benchmarks import FakeTimer, bench, double

from benchmarks.benchmark import Prepared, UnavailableError
from benchmarks.measuring import measure, relative_error


def test_ours_and_peers_are_timed_on_the_same_rotated_inputs():
    timer = FakeTimer(1.0, 2.0, 3.0)
    peer = {"torch": lambda i: Prepared(lambda: i.x + i.x, note="adds")}
    ours, other = measure(double(peers=peer), bench(timer))
    assert (ours.implementation, ours.status) == ("llmopt", "measured")
    assert (ours.p20_ms, ours.p50_ms, ours.p80_ms) == pytest.approx((1.4, 2.0, 2.6))
    assert ours.rate == pytest.approx(800 / 2e-3 / 1e9)
    assert ours.fraction_of_ceiling == pytest.approx(ours.rate / 4000)
    assert ours.floor_ms == pytest.approx(800 / 4000e6)
    assert ours.captured and ours.calls_per_sample == 4 and ours.num_samples == 3
    assert (other.implementation, other.reason) == ("torch", "adds")
    assert timer.timed == [2, 2] and ours.input_sets == 2


def test_a_missing_ceiling_leaves_the_share_open():
    (row,) = measure(double(unit="TFLOP/s", ceiling="fp8"), bench())
    assert row.rate == pytest.approx(100 / 2e-3 / 1e12)
    assert row.fraction_of_ceiling is None and row.floor_ms is None


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (lambda x: 2.1 * x, "relative error 5.00e-02 against the reference, limit 1e-06"),
        (lambda x: torch.empty_like(x), "relative error inf"),  # new memory is NaN
        (lambda x: 2 * x[:-1], r"its output is \[99\], expected \[100\]"),
        (lambda x: x @ x[:3], "RuntimeError: "),
    ],
)
def test_what_is_wrong_is_not_timed(ours, words):
    timer = FakeTimer()
    (row,) = measure(double(ours=ours), bench(timer))
    assert row.status == "failed" and row.p50_ms is None and not timer.timed
    assert re.search(words, row.reason)


def test_what_is_right_first_and_wrong_later_fails():
    runs = []

    def racing(x):
        runs.append(0)
        return 2 * x if len(runs) == 1 else 3 * x

    (row,) = measure(double(ours=racing), bench())
    assert row.status == "failed" and "relative error" in row.reason


def test_a_peer_that_does_not_run_says_why():
    def refuses(i):
        raise UnavailableError("needs a GPU")

    def warns(i):
        warnings.warn("head dimension 7 is odd (Triggered internally at x.cpp)", stacklevel=2)
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    def differs(i):
        return Prepared(lambda: i.x)

    peers = {"a": refuses, "b": warns, "c": differs}
    ours, *rows = measure(double(peers=peers), bench())
    assert ours.status == "measured"
    assert [row.status for row in rows] == ["unavailable"] * 3
    assert rows[0].reason == "UnavailableError: needs a GPU"
    assert rows[1].reason == (
        "RuntimeError: No available kernel. Aborting execution. | head dimension 7 is odd"
    )
    assert "relative error 5.00e-01" in rows[2].reason


def test_inputs_that_cannot_be_built_give_rows_too():
    def build(device, seed):
        raise MemoryError("too large")

    rows = list(measure(double(build=build, peers={"torch": lambda i: None}), bench()))
    assert [row.status for row in rows] == ["failed", "failed"]
    assert rows[0].reason == "its inputs or reference: MemoryError: too large"


def test_memory_is_poisoned_only_while_checking():
    list(measure(double(), bench()))
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_error_is_relative_by_norm():
    found, expected = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0], dtype=torch.float64)
    assert relative_error(found, expected) == pytest.approx(1 / 34**0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
