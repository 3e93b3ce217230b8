"""Time every candidate configuration, and write down which was fastest. Changes no code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.benchmark import OURS, Benchmark, Make, Prepared, Tunable
from benchmarks.rows import Environment, Row

BUILDING_S = 3.0
"""Of the inputs and the reference of a problem; there are no peers to compile."""


@dataclass(frozen=True, slots=True)
class Winner:
    """The fastest configuration of one problem; times are medians in ms.

    Attributes:
        operation: which.
        benchmark: which problem.
        shipped: what the launcher takes.
        shipped_ms: its time; ``None`` if it was not measured.
        fastest: the configuration that took least.
        fastest_ms: its time.
        num_measured: candidates with a time.
        num_refused: candidates without one.
    """

    operation: str
    benchmark: str
    shipped: str
    shipped_ms: float | None
    fastest: str
    fastest_ms: float | None
    num_measured: int
    num_refused: int


def tunings(benchmarks: Iterable[Benchmark]) -> list[Benchmark]:
    """The tunable benchmarks, with candidates where peers stood."""
    return [
        replace(it, peers=_candidates(it.tunable), peer_slack=1.0, estimated_s=BUILDING_S)
        for it in benchmarks
        if it.tunable is not None
    ]


def winners(benchmarks: Sequence[Benchmark], rows: Sequence[Row]) -> list[Winner]:
    """The fastest configuration of each problem that has rows."""
    found = []
    for benchmark in benchmarks:
        assert benchmark.tunable is not None
        own = [
            r for r in rows if (r.operation, r.benchmark) == (benchmark.operation, benchmark.name)
        ]
        if not own:
            continue
        times = {r.implementation: r.p50_ms for r in own if r.p50_ms is not None}
        fastest = min(times, key=lambda name: times[name], default=None)
        shipped = str(benchmark.tunable.shipped)
        found.append(
            Winner(
                benchmark.operation,
                benchmark.name,
                shipped,
                times.get(OURS),
                "none" if fastest is None else shipped if fastest == OURS else fastest,
                None if fastest is None else times[fastest],
                len(times),
                len(own) - len(times),
            )
        )
    return found


def notes(environment: Environment, found: Sequence[Winner]) -> str:
    """A Markdown page: winners by problem."""
    env = environment
    lines = [
        f"# Tuning on {env.device}",
        "",
        f"torch {env.torch}, triton {env.triton}, commit {env.commit}, {env.date}. Medians in ms; "
        "gain is the time of the shipped configuration over that of the fastest.",
        "",
        "| operation | problem | shipped | ms | fastest | ms | gain | measured | refused |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for w in found:
        gain = "" if not w.shipped_ms or not w.fastest_ms else f"{w.shipped_ms / w.fastest_ms:.2f}"
        cells = (
            w.operation, w.benchmark, w.shipped, _ms(w.shipped_ms), w.fastest, _ms(w.fastest_ms),
            gain, str(w.num_measured), str(w.num_refused),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _candidates(tunable: Tunable) -> dict[str, Make]:
    others = [c for c in dict.fromkeys(tunable.candidates) if c != tunable.shipped]
    return {str(config): partial(_make, tunable, config) for config in others}


def _make(tunable: Tunable, config: object, inputs: object) -> Prepared:
    return tunable.make(inputs, config)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
