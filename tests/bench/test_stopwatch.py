"""Phases that nest."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from llmopt.bench.stopwatch import Stopwatch


def test_a_second_counts_for_the_innermost_phase_alone() -> None:
    ticks: Iterator[int] = iter([0, 2, 5, 9, 10, 16])
    stopwatch = Stopwatch(lambda: next(ticks))
    with stopwatch.phase("outer"):
        with stopwatch.phase("inner"):
            pass
        with stopwatch.phase("inner"):
            pass
    assert stopwatch.seconds == {"outer": 2 + 4 + 6, "inner": 3 + 1}


def test_what_is_watched_counts_even_when_it_raises() -> None:
    ticks: Iterator[int] = iter([0, 3])
    stopwatch = Stopwatch(lambda: next(ticks))

    def fail(message: str) -> None:
        raise ValueError(message)

    owner = SimpleNamespace(work=fail)
    stopwatch.watch(owner, "work", "phase")
    with pytest.raises(ValueError, match="told"):
        owner.work("told")
    assert stopwatch.seconds == {"phase": 3}
