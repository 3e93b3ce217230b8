"""What was measured so far, a line an event: it outlives a process that a kernel brought down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.benchmark import OURS, Benchmark
from benchmarks.ceilings import Ceilings
from benchmarks.rows import Environment, Row, Status, row_from, row_without_time


@dataclass(slots=True)
class Journal:
    """Everything in the file at ``path``; writing appends there too."""

    path: Path
    ceilings: Ceilings | None = None
    environment: Environment | None = None
    rows: list[Row] = field(default_factory=list)
    began: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Read a file that need not exist yet, and some lines of which may be cut off."""
        journal = cls(path)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a crash, or just being written
            match event["event"]:
                case "start":
                    journal.environment = Environment(**event["environment"])
                    journal.ceilings = Ceilings(**event["ceilings"])
                case "row":
                    journal.rows.append(row_from(event["row"]))
                case "began":
                    journal.began.append(event["key"])
                case "ended":
                    journal.ended.append(event["key"])
        return journal

    def start(self, environment: Environment, ceilings: Ceilings) -> None:
        """Write down what holds for the whole run."""
        self.environment, self.ceilings = environment, ceilings
        self._append("start", environment=asdict(environment), ceilings=asdict(ceilings))

    def begin(self, benchmark: Benchmark) -> None:
        """Write down that ``benchmark`` is next: after a crash it is not tried again."""
        self.began.append(benchmark.key)
        self._append("began", key=benchmark.key)

    def add(self, row: Row) -> None:
        """Write down a row."""
        self.rows.append(row)
        self._append("row", row=asdict(row))

    def end(self, benchmark: Benchmark) -> None:
        """Write down that all rows of ``benchmark`` are there."""
        self.ended.append(benchmark.key)
        self._append("ended", key=benchmark.key)

    def close_broken(self, benchmarks: Sequence[Benchmark], reason: str) -> None:
        """Give every benchmark that began and did not end its missing rows."""
        for benchmark in benchmarks:
            if benchmark.key not in self.began or benchmark.key in self.ended:
                continue
            done = {
                row.implementation
                for row in self.rows
                if (row.operation, row.benchmark) == (benchmark.operation, benchmark.name)
            }
            missing = [name for name in (OURS, *benchmark.peers) if name not in done]
            for name in missing:
                status: Status = "failed" if name == OURS else "unavailable"
                why = reason if name == missing[0] else f"not reached: {reason}"
                self.add(self._without(benchmark, name, status, why))
            self.end(benchmark)

    def leave_out(self, benchmarks: Sequence[Benchmark], reason: str) -> None:
        """Give every benchmark that never began its rows."""
        for benchmark in benchmarks:
            if benchmark.key in self.began:
                continue
            self.begin(benchmark)
            for name in (OURS, *benchmark.peers):
                self.add(self._without(benchmark, name, "left out", reason))
            self.end(benchmark)

    def _without(self, benchmark: Benchmark, name: str, status: Status, reason: str) -> Row:
        assert self.environment is not None
        return row_without_time(benchmark, name, status, reason, self.environment)

    def _append(self, event: str, **data: object) -> None:
        with self.path.open("ab+") as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps({"event": event, **data}).encode() + b"\n")
