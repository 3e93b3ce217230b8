"""The process that measures: benchmark after benchmark, until all are done or time is up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.journal import Journal
from benchmarks.measuring import Bench, measure
from benchmarks.rows import Row

BROKEN = 3
"""Exit status of a process whose device no longer answers; another process may go on."""

OVERHEAD_S = 0.6
"""Of each implementation: compiling or choosing a kernel, checking twice, capturing."""


def in_order(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    """What goals rest on comes first, else as given."""
    return sorted(benchmarks, key=lambda benchmark: benchmark.priority)


def estimated_s(benchmark: Benchmark, bench: Bench) -> float:
    """About how long a benchmark takes with its peers, in seconds."""
    return benchmark.estimated_s + (1 + len(benchmark.peers)) * (bench.seconds + OVERHEAD_S)


def work(
    benchmarks: Sequence[Benchmark],
    bench: Bench,
    journal: Journal,
    deadline: float,
    clock: Callable[[], float] = time.time,
    tell: Callable[[str], None] = print,
) -> int:
    """Measure what the journal lacks; 0 when through, ``BROKEN`` if the device broke.

    Args:
        benchmarks: those of the run.
        bench: where and how.
        journal: takes rows as they come.
        deadline: by ``clock``; what would pass it is left out, with a row that says so.
        clock: seconds.
        tell: takes progress lines.
    """
    for benchmark in in_order(benchmarks):
        if benchmark.key in journal.began:
            continue
        if bench.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        left, needed = deadline - clock(), estimated_s(benchmark, bench)
        if needed > left:
            reason = f"would take about {needed:.0f} s, {max(left, 0.0):.0f} s were left"
            journal.leave_out([benchmark], reason)
            tell(f"{benchmark.key}: left out, {reason}")
            continue
        journal.begin(benchmark)
        began = clock()
        for row in measure(benchmark, bench):
            journal.add(row)
            tell(_line(row))
        if bench.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                tell(f"the device broke: {error}")
                journal.end(benchmark)
                return BROKEN
        journal.end(benchmark)
        tell(f"{benchmark.key}: {clock() - began:.1f} s, estimated {needed:.1f} s")
    return 0


def _line(row: Row) -> str:
    name = f"  {row.implementation:28}"
    if row.status != "measured":
        return f"{name} {row.status}: {row.reason}"
    share = "" if row.fraction_of_ceiling is None else f", {row.fraction_of_ceiling:.1%} of ceiling"
    return f"{name} p50 {row.p50_ms:9.4f} ms, {row.rate:8.1f} {row.unit}{share}  {row.reason}"
