"""Problems and timers for the tests of the benchmark."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.benchmark import Benchmark, Prepared
from benchmarks.ceilings import Ceilings
from benchmarks.measuring import Bench
from benchmarks.rows import Environment, Row
from benchmarks.timing import Times

ENVIRONMENT = Environment("NVIDIA H200", "9.0", "2.11", "3.6", "13.0", "580", "3.12", "abc", "2026")
CEILINGS = Ceilings(copy=4000.0, bf16=800.0, fp8=None, notes={"fp8": "RuntimeError: no fp8 here"})


class FakeTimer:
    """Runs every call once and returns the same times for all."""

    def __init__(self, *samples_ms: float) -> None:
        self.samples_ms = samples_ms or (1.0, 2.0, 3.0)
        self.timed: list[int] = []

    def __call__(self, calls, seconds, capture=True):
        for call in calls:
            call()
        self.timed.append(len(calls))
        return Times(self.samples_ms, 4, capture)


def bench(timer=None, seconds=0.1):
    device = torch.device("cpu")
    return Bench(device, timer or FakeTimer(), CEILINGS, ENVIRONMENT, seconds, max_sets=2)


def double(name="double", ours=lambda x: 2 * x, operation="op", **changes):
    """Twice a vector: 800 bytes, 100 operations."""
    given = {
        "operation": operation,
        "name": name,
        "unit": "GB/s",
        "ceiling": "copy",
        "num_bytes": 800,
        "num_flops": 100,
        "build": lambda device, seed: SimpleNamespace(
            x=torch.randn(100, generator=torch.Generator().manual_seed(seed))
        ),
        "ours": lambda i: Prepared(lambda: ours(i.x)),
        "expected": lambda i: 2 * i.x.double(),
        "tolerance": 1e-6,
    }
    return Benchmark(**{**given, **changes})


def row(**changes):
    given = {
        "operation": "op",
        "benchmark": "case",
        "implementation": "llmopt",
        "status": "measured",
        "unit": "GB/s",
        "environment": ENVIRONMENT,
        "p20_ms": 0.9,
        "p50_ms": 1.0,
        "p80_ms": 1.1,
        "rate": 3600.0,
        "fraction_of_ceiling": 0.9,
        "relative_error": 1e-3,
    }
    return Row(**{**given, **changes})
