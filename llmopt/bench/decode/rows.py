"""Rows of the decode benchmark, the report that holds them, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmopt.bench.decode.agreement import Agreement
from llmopt.bench.decode.timing import Timing
from llmopt.bench.decode.traffic import Bandwidth
from llmopt.bench.rows import SCHEMA_VERSION, Status
from llmopt.checkpoint.durable import write_bytes


@dataclass(frozen=True, slots=True)
class DecodeSetting:
    """What all rows have in common.

    Attributes:
        model: what was decoded; of a grown one, what it was grown from and to.
        num_parameters: of it.
        is_grown: whether it is.
        dtype: of activations and of 16-bit weights.
        new_tokens: that each request of a batch wants.
        device: ``cpu`` or ``cuda``.
        machine: processor and number of cores, or the GPU.
        threads: of every engine.
        bandwidth: what memory gave, in the same run.
        python: version of the benchmark's own interpreter.
        commit: of the checkout, with ``-dirty`` where it was changed; none outside one.
        date: UTC.
    """

    model: str
    num_parameters: int
    is_grown: bool
    dtype: str
    new_tokens: int
    device: str
    machine: str
    threads: int
    bandwidth: Bandwidth
    python: str
    commit: str | None
    date: str


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One engine, kind of weights, cache and workload.

    Attributes:
        engine: its name.
        variant: which of its ways to decode.
        weights: ``16-bit``, ``int4``, or a kind of GGUF file.
        kv: the cache's elements.
        workload: ``mixed`` or ``BATCHxCONTEXT``.
        batch: requests.
        context: tokens of a prompt; none of mixed ones.
        status: ``unavailable`` could not be installed, ``failed`` broke.
        model: what was decoded; of a grown one, what it was grown from and to.
        machine: it ran on.
        commit: of the checkout.
        is_grown: whether the model is.
        reason: why it was not measured.
        repeats: runs behind the spreads.
        timing: rates and latencies.
        peak_bytes: highest memory beyond the interpreter with its imports.
        step_bytes: of weights and cache that a decode step must read, on average.
        floor_tokens_per_s: what memory's bandwidth allows at most.
        agreement: of its tokens with the reference's; none where nobody has the same weights.
        versions: of its packages.
        notes: what a reader must know.
    """

    engine: str
    variant: str
    weights: str
    kv: str
    workload: str
    batch: int
    context: int | None
    status: Status
    model: str
    machine: str
    commit: str | None
    is_grown: bool = False
    reason: str = ""
    repeats: int = 0
    timing: Timing | None = None
    peak_bytes: int | None = None
    step_bytes: float | None = None
    floor_tokens_per_s: float | None = None
    agreement: Agreement | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The engine with its variant."""
        return f"{self.engine} ({self.variant})" if self.variant else self.engine

    @property
    def rate(self) -> float:
        """Median tokens a second."""
        assert self.timing is not None
        return self.timing.tokens_per_s.p50

    @property
    def achieved_bytes_per_s(self) -> float | None:
        """Bytes of the floor over the time that a step took; none of mixed requests."""
        if self.step_bytes is None:
            return None
        return self.step_bytes * self.rate / self.batch

    @property
    def of_floor(self) -> float | None:
        """The rate over the floor's; none of mixed requests."""
        if self.floor_tokens_per_s is None:
            return None
        return self.rate / self.floor_tokens_per_s


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """The rows of one run."""

    setting: DecodeSetting
    rows: tuple[DecodeRow, ...]
    complete: bool

    @property
    def measured(self) -> tuple[DecodeRow, ...]:
        """Those that have numbers."""
        return tuple(row for row in self.rows if row.status == "measured")


def write_decode_json(path: Path, report: DecodeReport, sentences: list[str]) -> None:
    """Write the JSON file, whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    data = {"version": SCHEMA_VERSION, **asdict(report), "sentences": sentences}
    for row, found in zip(data["rows"], report.rows, strict=True):
        if found.status == "measured":
            row["achieved_bytes_per_s"] = found.achieved_bytes_per_s
            row["of_floor"] = found.of_floor
    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())
