"""Every problem of the suite, small, from inputs to rows on a CPU."""

import pytest
import torch
from support.kernels_benchmarks import FakeTimer, bench

from benchmarks import suite
from benchmarks.ceilings import measure_ceilings
from benchmarks.goals import SCALED_MM, SDPA_CUDNN, SDPA_EFFICIENT
from benchmarks.measuring import measure, relative_error
from benchmarks.tune import tunings

BLOCK_SCALES = "quantize_rows, then torch._scaled_mm"
NOT_ON_A_CPU = (SDPA_CUDNN, SDPA_EFFICIENT, SCALED_MM, BLOCK_SCALES)


@pytest.fixture(params=suite.OPERATIONS)
def operation(request):
    return request.param


def test_ours_is_right_and_every_peer_runs_or_says_why_not(operation):
    problems = list(suite.benchmarks([operation], "tiny"))
    assert problems
    for problem in problems:
        ours, *peers = measure(problem, bench())
        assert ours.status == "measured", (problem.key, ours.reason)
        assert [row.implementation for row in peers] == list(problem.peers)
        for row in peers:
            assert row.status == "measured" or row.reason, (problem.key, row)
            assert "relative error" not in row.reason, row
            assert row.status == "measured" or row.implementation in NOT_ON_A_CPU, row


def test_the_real_problems_have_the_same_names_and_sane_counts(operation):
    problems = list(suite.benchmarks([operation], "real"))
    assert len({problem.key for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.operation == operation
        assert problem.num_bytes > 0 and problem.num_flops >= 0
        # Under a minute each, and nothing that a card of 80 GB could not hold.
        assert problem.num_bytes < 20e9 and problem.estimated_s < 60


def test_tunable_problems_have_candidates(operation):
    for problem in tunings(suite.benchmarks([operation], "real")):
        assert problem.peers and problem.tunable is not None
        assert str(problem.tunable.shipped) not in problem.peers


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels in the interpreter")
def test_a_configuration_reaches_the_kernel(operation):
    for problem in suite.benchmarks([operation], "tiny"):
        if problem.tunable is None:
            continue
        inputs = problem.build(torch.device("cpu"), 0)
        output = problem.tunable.make(inputs, problem.tunable.shipped).call()
        error = relative_error(problem.part(output), problem.expected(inputs))
        assert error <= problem.tolerance, (problem.key, error)


def test_ceilings_are_measured_by_the_same_timer():
    found = measure_ceilings(torch.device("cpu"), FakeTimer(1.0), "tiny")
    assert found.copy == pytest.approx(2 * (1 << 16) / 1e6)
    assert found.bf16 == pytest.approx(2 * 64**3 / 1e9)
    assert (found.fp8 is None) == ("fp8" in found.notes)
    assert found.floor_ms(1000, 0, "copy") == pytest.approx(1000 / found.copy / 1e6)
