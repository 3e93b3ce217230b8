"""The problems, one module an operation; each gives ``benchmarks(scale)``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence

from benchmarks.benchmark import Benchmark, Scale

OPERATIONS: tuple[str, ...] = tuple(
    sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
)


def benchmarks(operations: Sequence[str], scale: Scale) -> Iterator[Benchmark]:
    """All problems of some operations, in order."""
    for name in operations:
        yield from importlib.import_module(f"benchmarks.suite.{name}").benchmarks(scale)
