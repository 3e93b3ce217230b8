"""Rows of the quantizers' benchmark, the report that holds them, and its file.

The file is written whole after every row, so that an interrupted benchmark keeps what it measured.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from llmopt.bench.evaluating import Quality
from llmopt.bench.floor import Floor
from llmopt.bench.measuring import Measurement
from llmopt.checkpoint.durable import write_bytes

SCHEMA_VERSION = 1
Status = Literal["measured", "unavailable", "failed"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles over the repeats; all the same where there was one."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True, slots=True)
class Row:
    """One quantizer with one method.

    Attributes:
        quantizer: its name.
        method: ``rtn``, ``gptq`` or ``awq``.
        scheme: ``W4A16 g128 sym``.
        status: ``unavailable`` could not be installed, ``failed`` broke.
        reason: why it was not measured.
        repeats: runs behind the spreads.
        wall_s: seconds of the whole process, imports included.
        quantize_s: seconds from the loaded model to the written one.
        cpu_s: processor seconds of the process and its children.
        peak_rss_bytes: highest resident memory.
        beyond_own_bytes: of that, above what the interpreter took after its imports.
        beyond_own_anonymous_bytes: the same without pages of files, sampled.
        size_bytes: of the output's tensors, files ``*.safetensors``.
        quality: against the source, of the last run.
        phases_s: parts of ``quantize_s`` where the quantizer tells them, medians.
        versions: of its packages.
        notes: what a reader must know.
    """

    quantizer: str
    method: str
    scheme: str
    status: Status
    reason: str = ""
    repeats: int = 0
    wall_s: Spread | None = None
    quantize_s: Spread | None = None
    cpu_s: Spread | None = None
    peak_rss_bytes: Spread | None = None
    beyond_own_bytes: Spread | None = None
    beyond_own_anonymous_bytes: Spread | None = None
    size_bytes: int | None = None
    quality: Quality | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """What all rows have in common.

    Attributes:
        model: the source's folder name.
        num_parameters: of it.
        num_samples: calibration blocks.
        length: tokens of each.
        tokens_sha256: of the calibration tokens.
        held_out_tokens: that quality was measured on.
        memory_bound_bytes: largest block in float32, its Hessians, hidden states in 16 bit.
        threads: of every quantizer.
        machine: processor and number of cores.
        python: version of the benchmark's own interpreter.
        commit: of the checkout, with ``-dirty`` where it was changed; none outside one.
        date: UTC.
    """

    model: str
    num_parameters: int
    num_samples: int
    length: int
    tokens_sha256: str
    held_out_tokens: int
    memory_bound_bytes: int
    threads: int
    machine: str
    python: str
    commit: str | None
    date: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The rows of one run, and the floor under them."""

    setting: Setting
    floor: Floor
    rows: tuple[Row, ...]
    complete: bool


def measured_row(
    quantizer: str,
    method: str,
    scheme: str,
    runs: Sequence[Measurement],
    size_bytes: int,
    quality: Quality,
) -> Row:
    """The row of at least one run that succeeded."""
    answers = [run.response for run in runs]
    phases = {name for answer in answers for name in answer.phases_s}
    return Row(
        quantizer,
        method,
        scheme,
        "measured",
        repeats=len(runs),
        wall_s=spread([run.wall_s for run in runs]),
        quantize_s=spread([answer.quantize_s for answer in answers]),
        cpu_s=spread([run.cpu_s for run in runs]),
        peak_rss_bytes=spread([answer.peak_rss_bytes for answer in answers]),
        beyond_own_bytes=spread([a.peak_rss_bytes - a.own_rss_bytes for a in answers]),
        beyond_own_anonymous_bytes=spread(
            [run.peak_anonymous_bytes - run.response.own_anonymous_bytes for run in runs]
        ),
        size_bytes=size_bytes,
        quality=quality,
        phases_s={
            name: statistics.median(answer.phases_s.get(name, 0.0) for answer in answers)
            for name in sorted(phases)
        },
        versions=answers[-1].versions,
        notes=tuple(dict.fromkeys(note for answer in answers for note in answer.notes)),
    )


def spread(values: Sequence[float]) -> Spread:
    """The percentiles, interpolated between the sorted values."""
    if len(values) == 1:
        return Spread(*(float(values[0]),) * 3)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(cuts[1], statistics.median(values), cuts[7])


def write_report(path: Path, report: BenchReport) -> None:
    """Write the JSON file, whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    floor = asdict(report.floor) | {
        name: getattr(report.floor, name) for name in ("float32_s", "bfloat16_s", "mixed_s")
    }
    data = {"version": SCHEMA_VERSION, **asdict(report), "floor": floor}
    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())


def machine_name() -> str:
    """Processor and number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text("utf-8", errors="replace").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
        name = next(names, name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def current_commit() -> str | None:
    """The checkout's commit; none where llmopt is installed, or git is not."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
