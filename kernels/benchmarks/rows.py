"""Rows, the report that holds them, its JSON file and its table."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.benchmark import Benchmark, Unit
from benchmarks.ceilings import Ceilings
from benchmarks.goals import GoalResult

SCHEMA_VERSION = 1
Status = Literal["measured", "failed", "unavailable", "left out"]


@dataclass(frozen=True, slots=True)
class Environment:
    """What the numbers depend on."""

    device: str
    capability: str
    torch: str
    triton: str | None
    cuda: str | None
    driver: str | None
    python: str
    commit: str | None
    date: str


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation on one problem.

    Attributes:
        operation: which.
        benchmark: which problem of it.
        implementation: ``llmopt`` or a peer.
        status: ``failed`` is ours being wrong or breaking; a peer that does not run here is
            ``unavailable``.
        reason: why there is no time, or what to know about it.
        p20_ms: 20th percentile, milliseconds a call.
        p50_ms: median.
        p80_ms: 80th percentile.
        rate: in ``unit``, at the median; it counts the bytes or operations that the problem needs,
            whatever the implementation moves.
        unit: of ``rate``.
        fraction_of_ceiling: ``rate`` over the ceiling measured in this run.
        floor_ms: the least time that this run's ceilings leave.
        relative_error: against the reference, before it was timed.
        tolerance: of it.
        input_sets: rotated, so that inputs come from memory.
        calls_per_sample: above 1 in a CUDA graph.
        captured: whether it ran in a CUDA graph.
        num_samples: of time.
        environment: versions, device, commit.
    """

    operation: str
    benchmark: str
    implementation: str
    status: Status
    unit: Unit
    environment: Environment
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rate: float | None = None
    fraction_of_ceiling: float | None = None
    floor_ms: float | None = None
    relative_error: float | None = None
    tolerance: float | None = None
    input_sets: int = 1
    calls_per_sample: int = 1
    captured: bool = False
    num_samples: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Everything of one run; ``seconds`` it took."""

    environment: Environment
    ceilings: Ceilings | None
    rows: Sequence[Row]
    goals: Sequence[GoalResult]
    seconds: float
    notes: Sequence[str] = field(default_factory=tuple)


def this_environment(device: torch.device, commit: str | None = None) -> Environment:
    """Read versions, device and commit; ``commit`` where git cannot say."""
    name, capability, driver = "CPU", "", None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    here = Path(__file__).parent
    status = ["git", "-C", str(here), "status", "--porcelain", "--", "..", ":(exclude)results"]
    changed = _output(status)
    head = _output(["git", "-C", str(here), "rev-parse", "--short", "HEAD"])
    return Environment(
        device=name,
        capability=capability,
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        driver=driver,
        python=platform.python_version(),
        commit=commit or (f"{head} with changes" if head and changed else head),
        date=datetime.now(UTC).date().isoformat(),
    )


def file_name(device: str) -> str:
    """``NVIDIA H200`` to ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def to_json(report: Report) -> str:
    """The report as JSON, a row a line."""
    head = {
        "schema_version": SCHEMA_VERSION,
        "environment": asdict(report.environment),
        "ceilings": None if report.ceilings is None else asdict(report.ceilings),
        "seconds": round(report.seconds, 1),
        "notes": list(report.notes),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, items in (("goals", report.goals), ("rows", report.rows)):
        inner = ",\n".join(f"  {json.dumps(asdict(item))}" for item in items)
        lines.append(f' "{key}": [\n{inner}\n ]' if inner else f' "{key}": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str) -> Report:
    """The inverse of ``to_json``.

    Raises:
        ValueError: another schema version.
    """
    data = json.loads(text)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"results of schema version {data.get('schema_version')}; this reads {SCHEMA_VERSION}"
        )
    ceilings = data["ceilings"]
    return Report(
        environment=Environment(**data["environment"]),
        ceilings=None if ceilings is None else Ceilings(**ceilings),
        rows=tuple(row_from(row) for row in data["rows"]),
        goals=tuple(GoalResult(**goal) for goal in data["goals"]),
        seconds=data["seconds"],
        notes=tuple(data["notes"]),
    )


def row_without_time(
    benchmark: Benchmark, name: str, status: Status, reason: str, environment: Environment
) -> Row:
    """The row of an implementation that was not timed."""
    it = benchmark
    return Row(it.operation, it.name, name, status, it.unit, environment, reason=reason)


def row_from(data: dict[str, Any]) -> Row:
    """A row from what ``asdict`` made of it."""
    return Row(**{**data, "environment": Environment(**data["environment"])})


def table(report: Report) -> str:
    """The report for a person: ceilings, rows, goals."""
    env = report.environment
    parts = [
        f"{env.device}, torch {env.torch}, triton {env.triton}, commit {env.commit}, {env.date}",
        _ceilings_line(report.ceilings),
        "",
        _columns([HEADINGS, *[_cells(row) for row in report.rows]]),
        "",
        _columns([GOAL_HEADINGS, *[_goal_cells(goal) for goal in report.goals]]),
        "",
        *report.notes,
        _summary(report),
    ]
    return "\n".join(parts)


HEADINGS = (
    "operation", "problem", "implementation", "p20 ms", "p50 ms", "p80 ms", "rate", "of ceiling",
    "error", "",
)  # fmt: skip
GOAL_HEADINGS = ("goal", "target", "found", "")


def _cells(row: Row) -> tuple[str, ...]:
    if row.status != "measured":
        why = f"{row.status}: {row.reason}"
        return (row.operation, row.benchmark, row.implementation, *([""] * 5), "", why)
    return (
        row.operation,
        row.benchmark,
        row.implementation,
        *(f"{value:.4f}" for value in (row.p20_ms, row.p50_ms, row.p80_ms) if value is not None),
        f"{row.rate:.0f} {row.unit}",
        "" if row.fraction_of_ceiling is None else f"{row.fraction_of_ceiling:.1%}",
        "" if row.relative_error is None else f"{row.relative_error:.1e}",
        row.reason,
    )


def _goal_cells(goal: GoalResult) -> tuple[str, ...]:
    found = "" if goal.found is None else f"{goal.found:.3f}"
    return (goal.metric, f"{goal.target:.2f}", found, f"{goal.outcome} {goal.reason}".strip())


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    return "\n".join(
        "  ".join([c.ljust(w) for c, w in zip(line, widths, strict=False)] + [line[-1]]).rstrip()
        for line in lines
    )


def _ceilings_line(ceilings: Ceilings | None) -> str:
    if ceilings is None:
        return "ceilings: not measured"
    parts = [
        f"{name} {ceilings.notes.get(name, '')}"
        if rate is None
        else f"{name} {rate:.0f} {'GB/s' if name == 'copy' else 'TFLOP/s'}"
        for name, rate in (("copy", ceilings.copy), ("bf16", ceilings.bf16), ("fp8", ceilings.fp8))
    ]
    return "ceilings measured: " + ", ".join(parts)


def _summary(report: Report) -> str:
    counts = {s: sum(row.status == s for row in report.rows) for s in Status.__args__}  # type: ignore[attr-defined]
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{len(report.rows)} rows: {words}; {report.seconds:.0f} s"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
