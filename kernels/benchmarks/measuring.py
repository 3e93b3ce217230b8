"""One benchmark to its rows: check, then time, ours and then each peer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.benchmark import OURS, Benchmark, Make, Prepared
from benchmarks.ceilings import Ceilings
from benchmarks.rows import Environment, Row, Status, row_without_time
from benchmarks.timing import MAX_SETS, Timer, Times, num_sets


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how to measure.

    Attributes:
        device: of the inputs.
        timer: of calls.
        ceilings: of this run.
        environment: for the rows.
        seconds: of samples, for each implementation.
        max_sets: of inputs, rotated.
    """

    device: torch.device
    timer: Timer
    ceilings: Ceilings
    environment: Environment
    seconds: float = 0.2
    max_sets: int = MAX_SETS


class WrongError(Exception):
    """An output is too far from the reference."""


def measure(benchmark: Benchmark, bench: Bench) -> Iterator[Row]:
    """Rows of ours and of each peer; whatever cannot be measured is a row with its reason."""
    rows = _Rows(benchmark, bench)
    count = min(num_sets(benchmark.num_bytes), bench.max_sets)
    try:
        first = benchmark.build(bench.device, 0)
        sets = [first, *(benchmark.build(bench.device, s) for s in range(1, count))]
        expected = benchmark.expected(first)
    except Exception as error:
        for name in (OURS, *benchmark.peers):
            yield rows.without(name, "failed", f"its inputs or reference: {said(error)}")
        return
    yield rows.measured(OURS, benchmark.ours, sets, expected)
    for name, make in benchmark.peers.items():
        yield rows.measured(name, make, sets, expected)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where NaN is found."""
    if found.shape != expected.shape:
        raise WrongError(f"its output is {list(found.shape)}, expected {list(expected.shape)}")
    wide = expected.dtype
    difference = float(torch.linalg.vector_norm(found.to(wide) - expected, dtype=torch.float64))
    scale = float(torch.linalg.vector_norm(expected, dtype=torch.float64)) or 1.0
    return math.inf if math.isnan(difference) else difference / scale


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled with NaN (integers: the largest), so that none is left unwritten."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=before_warning)


def said(error: Exception) -> str:
    """An error as one line."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@dataclass(frozen=True, slots=True)
class _Rows:
    benchmark: Benchmark
    bench: Bench

    def measured(self, name: str, make: Make, sets: Sequence[Any], expected: Tensor) -> Row:
        ours = name == OURS
        limit = self.benchmark.tolerance * (1.0 if ours else self.benchmark.peer_slack)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                error = self._check(make(sets[0]), expected, limit, ours)
                prepared = [make(inputs) for inputs in sets]
                calls = [p.call for p in prepared]
                times = self.bench.timer(calls, self.bench.seconds, prepared[0].capture)
                # Once more: what was right before and is wrong now has a race.
                error = max(error, self._check(make(sets[0]), expected, limit, ours))
            except Exception as failure:
                reason = said(failure)
                if not ours and warned:
                    reason += " | " + "; ".join(_first_lines(warned))
                return self.without(name, "failed" if ours else "unavailable", reason)
        return self._row(name, times, error, limit, len(sets), prepared[0].note)

    def _check(self, prepared: Prepared, expected: Tensor, limit: float, ours: bool) -> float:
        # What torch compiled would be compiled again for poisoned memory.
        with poisoned_memory() if ours else nullcontext():
            output = prepared.call()
        error = relative_error(self.benchmark.part(output), expected)
        if not error <= limit:
            raise WrongError(f"relative error {error:.2e} against the reference, limit {limit:.0e}")
        return error

    def _row(
        self, name: str, times: Times, error: float, limit: float, sets: int, note: str
    ) -> Row:
        it, ceilings = self.benchmark, self.bench.ceilings
        p20, p50, p80 = (times.percentile(q) for q in (20, 50, 80))
        rate, ceiling = it.rate(p50), ceilings.rate(it.ceiling)
        return Row(
            it.operation,
            it.name,
            name,
            "measured",
            it.unit,
            self.bench.environment,
            reason="; ".join(filter(None, (note, times.note))),
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            rate=rate,
            fraction_of_ceiling=None if ceiling is None else rate / ceiling,
            floor_ms=ceilings.floor_ms(it.num_bytes, it.num_flops, it.ceiling),
            relative_error=error,
            tolerance=limit,
            input_sets=sets,
            calls_per_sample=times.calls_per_sample,
            captured=times.captured,
            num_samples=len(times.samples_ms),
        )

    def without(self, name: str, status: Status, reason: str) -> Row:
        return row_without_time(self.benchmark, name, status, reason, self.bench.environment)


def _first_lines(warned: Sequence[warnings.WarningMessage]) -> list[str]:
    """Each text once; what torch says of where in its source it warned goes."""
    lines = (str(w.message).strip().partition("\n")[0].partition(" (Triggered")[0] for w in warned)
    return list(dict.fromkeys(lines))[:4]
