"""``llmopt bench road``: the whole road once, its seconds and its memory beside the bound.

The bound is that of ``floor.memory_bound_bytes``: the largest decoder block and its Hessians in
float32, and the hidden states of the calibration in 16 bit, in and out.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from llmopt.bench.floor import memory_bound_bytes
from llmopt.bench.measuring import RUNNERS, Measurement, RoadRequest, measure
from llmopt.bench.quantize import check_output_file
from llmopt.bench.rows import current_commit, machine_name, now
from llmopt.bench.table import MIB
from llmopt.checkpoint.durable import storage_errors, write_bytes
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.recipe import load_recipe

SCHEMA_VERSION = 1
_WHOLE = "the whole road"


@dataclass(frozen=True, slots=True)
class RoadReport:
    """One run.

    Attributes:
        model: the source's folder name.
        num_parameters: of it.
        recipe: by which it was quantized.
        num_samples: calibration blocks.
        length: tokens of each.
        threads: of torch.
        memory_bound_bytes: see the module.
        machine: processor and number of cores.
        python: version.
        commit: of the checkout, with ``-dirty`` where it was changed; none outside one.
        date: UTC.
        run: what was measured.
    """

    model: str
    num_parameters: int
    recipe: str
    num_samples: int
    length: int
    threads: int
    memory_bound_bytes: int
    machine: str
    python: str
    commit: str | None
    date: str
    run: Measurement

    def beyond_own_bytes(self) -> dict[str, int]:
        """Peaks of anonymous memory above the interpreter's own, by step and of the whole."""
        own = self.run.response.own_anonymous_bytes
        steps = {step: peak - own for step, peak in self.run.response.peaks_bytes.items()}
        return steps | {_WHOLE: self.run.peak_anonymous_bytes - own}


def bench_road(
    model: Path,
    output: Path,
    *,
    recipe: str,
    num_samples: int,
    length: int,
    threads: int,
    runners: Path = RUNNERS,
) -> RoadReport:
    """Quantize and judge ``model`` in a process of its own; what it publishes is thrown away.

    Args:
        model: folder of a checkpoint.
        output: the JSON file; must not exist.
        recipe: name or file.
        num_samples: calibration blocks.
        length: tokens of each.
        threads: of torch.
        runners: folder of the runners.

    Raises:
        BadInputError: a model or a recipe that cannot be opened, an output that exists.
        RunError: the road ended before its verdict; with its last lines.
        StorageError: the disk refuses.
    """
    check_output_file(output)
    load_recipe(recipe)
    reader = open_checkpoint(model)
    structure = read_structure(reader)
    recipe_file = Path(recipe)
    asked = str(recipe_file.resolve()) if recipe_file.is_file() else recipe
    with tempfile.TemporaryDirectory(prefix="llmopt-road-") as scratch:
        folder = Path(scratch) / "run"
        with storage_errors(f"cannot prepare {folder}"):
            folder.mkdir()
        request = RoadRequest(
            str(model.resolve()), str(folder / "output"), asked, num_samples, length, threads
        )
        run = measure(Path(sys.executable), "run_road", request, folder, {}, runners)
    report = RoadReport(
        model=model.resolve().name,
        num_parameters=sum(reader.info(name).num_parameters for name in reader.names),
        recipe=recipe,
        num_samples=num_samples,
        length=length,
        threads=threads,
        memory_bound_bytes=memory_bound_bytes(structure, num_samples * length),
        machine=machine_name(),
        python=platform.python_version(),
        commit=current_commit(),
        date=now(),
        run=run,
    )
    data = {"version": SCHEMA_VERSION, **asdict(report)}
    write_bytes(output, (json.dumps(data, indent=1) + "\n").encode())
    return report


def road_markdown(report: RoadReport) -> str:
    """A table of memory by step, and what it holds for."""
    response, bound = report.run.response, report.memory_bound_bytes
    lines = ["| step | beyond own MiB | of bound |", "| --- | --- | --- |"]
    lines += [
        f"| {step} | {beyond / MIB:.0f} | {beyond / bound:.2f} |"
        for step, beyond in report.beyond_own_bytes().items()
    ]
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in response.phases_s.items())
    versions = ", ".join(f"{name} {version}" for name, version in response.versions.items())
    notes = [
        f"{report.model}, {report.num_parameters / 1e6:.1f} M parameters; {report.recipe}, "
        f"calibrated on {report.num_samples} x {report.length} tokens",
        f"{report.machine}; {report.threads} threads; Python {report.python}; {versions}; commit "
        f"{report.commit or 'unknown'}; {report.date}",
        f"bound of memory: {bound / MIB:.0f} MiB, the largest block and its Hessians in float32 "
        "and the hidden states in 16 bit, in and out; memory is resident and not a file's pages, "
        "above the interpreter with its imports",
        f"seconds: {stages}; {report.run.wall_s:.0f} s in all, {report.run.cpu_s:.0f} s of "
        "processor time",
        *response.notes,
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
