"""Times of calls on a GPU, from CUDA events, with cold inputs and without launch overhead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.benchmark import Call

FLUSHED_BYTES = 256 << 20
"""Written between two samples: several times the second-level cache of any GPU."""

ROTATED_BYTES = 256 << 20
"""Input sets are multiplied until they hold this much, so that a run finds none in the cache."""

MAX_SETS = 32
GRAPH_MS = 1.5
"""A captured graph lasts about this long, so that its own start does not count."""

MAX_CAPTURED = 500
CAPTURE_BELOW_MS = 2.0
"""Calls longer than this hide their launch by themselves."""

MIN_SAMPLES, MAX_SAMPLES = 5, 60


@dataclass(frozen=True, slots=True)
class Times:
    """Samples of one implementation.

    Attributes:
        samples_ms: of one call each, ascending; a sample may be the mean of several calls.
        calls_per_sample: how many.
        captured: whether they ran inside a CUDA graph.
        note: why not, if not as asked.
    """

    samples_ms: tuple[float, ...]
    calls_per_sample: int = 1
    captured: bool = False
    note: str = ""

    def percentile(self, q: float) -> float:
        """The ``q``-th percentile, 0 to 100, in ms."""
        return percentile(self.samples_ms, q)


class Timer(Protocol):
    """Times calls; those of one list compute the same from different inputs, in turn."""

    def __call__(self, calls: Sequence[Call], seconds: float, capture: bool = True) -> Times:
        """Warm up, then sample for about ``seconds``."""
        ...


def percentile(samples: Sequence[float], q: float) -> float:
    """The ``q``-th percentile of ascending ``samples``, linear between neighbours.

    Raises:
        ValueError: no samples, or ``q`` outside 0 to 100.
    """
    if not samples:
        raise ValueError("no samples")
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is not between 0 and 100")
    at = (len(samples) - 1) * q / 100
    low, high = math.floor(at), math.ceil(at)
    return samples[low] + (samples[high] - samples[low]) * (at - low)


def num_sets(set_bytes: int) -> int:
    """How many input sets of ``set_bytes`` are rotated."""
    return max(1, min(MAX_SETS, math.ceil(ROTATED_BYTES / max(set_bytes, 1))))


def num_samples(seconds: float, sample_ms: float) -> int:
    """How many samples of ``sample_ms`` fit into ``seconds``, within limits."""
    return max(MIN_SAMPLES, min(MAX_SAMPLES, int(seconds * 1e3 / max(sample_ms, 1e-3))))


def num_captured(call_ms: float, sets: int) -> int:
    """How many calls a graph holds: whole rounds over the input sets, ``GRAPH_MS`` in all."""
    rounds = math.ceil(min(MAX_CAPTURED, GRAPH_MS / max(call_ms, 1e-4)) / sets)
    return max(1, rounds) * sets


class CudaTimer:
    """Times on the current GPU.

    A short call is captured: a graph of many calls over rotating inputs is replayed, and a sample
    is the time of one replay over the number of calls. A long one is launched as it is. The cache
    is overwritten before each sample.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device=device)

    def __call__(self, calls: Sequence[Call], seconds: float, capture: bool = True) -> Times:
        """Warm up, then sample for about ``seconds``."""
        for call in [*calls, calls[0]]:
            call()
        torch.cuda.synchronize()
        call_ms = self._round(calls)
        if not capture or call_ms > CAPTURE_BELOW_MS:
            return self._direct(calls, seconds, call_ms)
        try:
            return self._captured(calls, seconds)
        except RuntimeError as error:
            torch.cuda.synchronize()  # a broken device must not pass for a failed capture
            why = str(error).strip().partition("\n")[0]
            direct = self._direct(calls, seconds, call_ms)
            return Times(direct.samples_ms, 1, False, f"not captured in a CUDA graph: {why}")

    def _round(self, calls: Sequence[Call]) -> float:
        """Milliseconds a call, launches and all, of two rounds over the inputs."""
        start, stop = _event(), _event()
        start.record()
        for call in [*calls, *calls]:
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / (2 * len(calls))

    def _direct(self, calls: Sequence[Call], seconds: float, call_ms: float) -> Times:
        count = num_samples(seconds, call_ms)
        return Times(self._samples([calls[i % len(calls)] for i in range(count)]))

    def _captured(self, calls: Sequence[Call], seconds: float) -> Times:
        # A launch takes longer than a short call, so its true time is only seen in a graph.
        first = _capture(calls, max(len(calls), 8))
        call_ms = min(self._samples([first.replay] * 3)) / max(len(calls), 8)
        del first
        count = num_captured(call_ms, len(calls))
        graph = _capture(calls, count)
        graph.replay()
        samples = self._samples([graph.replay] * num_samples(seconds, count * call_ms))
        return Times(tuple(sample / count for sample in samples), count, True)

    def _samples(self, calls: Sequence[Call]) -> tuple[float, ...]:
        """Milliseconds of each, ascending; everything is queued before the first is read."""
        events = [(_event(), _event()) for _ in calls]
        for call, (start, stop) in zip(calls, events, strict=True):
            self._flushed.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return tuple(sorted(start.elapsed_time(stop) for start, stop in events))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _capture(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    return graph
