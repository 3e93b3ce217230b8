"""Percentiles, counts, and the CUDA timer on events and graphs that are played."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import timing
from benchmarks.timing import CudaTimer, Times, num_captured, num_samples, num_sets, percentile


@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=20).map(sorted),
    st.floats(0, 100),
)
def test_percentiles_are_those_of_numpy(samples, q):
    assert percentile(samples, q) == pytest.approx(float(np.percentile(samples, q)), abs=1e-9)


@pytest.mark.parametrize(("samples", "q"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_no_percentile_of_nothing_or_outside(samples, q):
    with pytest.raises(ValueError, match="no samples|not between"):
        percentile(samples, q)


def test_inputs_are_rotated_until_they_exceed_the_cache():
    assert num_sets(1 << 30) == 1
    assert num_sets(100 << 20) == 3
    assert num_sets(1) == num_sets(0) == timing.MAX_SETS


def test_samples_fill_the_time_within_limits():
    assert num_samples(0.2, 10.0) == 20
    assert num_samples(0.2, 1000.0) == timing.MIN_SAMPLES
    assert num_samples(0.2, 0.0) == timing.MAX_SAMPLES


def test_a_graph_holds_whole_rounds():
    assert num_captured(call_ms=0.01, sets=4) == 152
    assert num_captured(call_ms=5.0, sets=3) == 3
    assert num_captured(call_ms=0.0, sets=7) % 7 == 0


class PlayedGpu:
    """A clock that calls move on; what is captured moves it when it is replayed."""

    def __init__(self, monkeypatch, can_capture=True):
        self.now, self.recording, self.launched, self.captured = 0.0, None, 0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return other.at - self.at

        class Graph:
            def __init__(self):
                self.ms = 0.0

            def replay(self):
                gpu.now += self.ms

        @contextlib.contextmanager
        def graph(it):
            if not can_capture:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            gpu.recording = it
            yield
            gpu.recording = None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing, "FLUSHED_BYTES", 64)

    def call(self, ms, launch_ms):
        def run():
            if self.recording is not None:
                self.recording.ms += ms
                self.captured += 1
            else:
                self.now += max(ms, launch_ms)
                self.launched += 1

        return run


def test_a_short_call_is_timed_in_a_graph_without_its_launch(monkeypatch):
    gpu = PlayedGpu(monkeypatch)
    times = CudaTimer("cpu")([gpu.call(0.01, 0.05), gpu.call(0.03, 0.05)], 0.1)
    assert times.captured and times.calls_per_sample == 76
    assert times.percentile(50) == pytest.approx(0.02)
    assert len(times.samples_ms) == timing.MAX_SAMPLES


def test_a_long_call_is_launched_as_it_is(monkeypatch):
    gpu = PlayedGpu(monkeypatch)
    times = CudaTimer("cpu")([gpu.call(10.0, 0.05)], 0.2)
    assert not times.captured and not times.note and gpu.captured == 0
    assert times.samples_ms == pytest.approx((10.0,) * 20)


def test_what_must_not_be_captured_is_not(monkeypatch):
    gpu = PlayedGpu(monkeypatch)
    times = CudaTimer("cpu")([gpu.call(0.01, 0.05)], 0.1, capture=False)
    assert not times.captured and gpu.captured == 0
    assert times.percentile(50) == pytest.approx(0.05)


def test_a_call_that_cannot_be_captured_is_launched_and_says_so(monkeypatch):
    gpu = PlayedGpu(monkeypatch, can_capture=False)
    times = CudaTimer("cpu")([gpu.call(0.01, 0.05)], 0.1)
    assert times.note == "not captured in a CUDA graph: operation not permitted"
    assert isinstance(times, Times) and times.calls_per_sample == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU")
def test_on_a_gpu_a_graph_leaves_the_launch_out():
    x = torch.randn(1000, device="cuda")
    timer = CudaTimer()
    captured, launched = timer([x.sin] * 2, 0.05), timer([x.sin] * 2, 0.05, capture=False)
    assert captured.captured and captured.calls_per_sample > 1
    assert not launched.captured and launched.percentile(50) > 0
