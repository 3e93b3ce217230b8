"""Measure the kernels and their peers on one GPU.

``python kernels/benchmarks/run.py [--only OP ...] [--tune] [--output FILE] [--seconds N]``: checks
every operation against its reference, times it and its peers on the same inputs, prints a table
and writes ``results/DEVICE.json``, goals included. With ``--tune`` it times every candidate
configuration instead and writes ``results/DEVICE-tuning.json`` and ``.md``. Exits with 2 where
there is no GPU, with 1 if an operation of ours failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(KERNELS)  # not this file's folder: no module there stands in for another
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch  # noqa: E402

from benchmarks import suite, tune  # noqa: E402
from benchmarks.benchmark import OURS, Benchmark, Scale  # noqa: E402
from benchmarks.ceilings import measure_ceilings  # noqa: E402
from benchmarks.goals import GOALS, SET_FOR, evaluate  # noqa: E402
from benchmarks.journal import Journal  # noqa: E402
from benchmarks.measuring import Bench  # noqa: E402
from benchmarks.rows import (  # noqa: E402
    Report,
    file_name,
    table,
    this_environment,
    to_json,
)
from benchmarks.supervising import supervise  # noqa: E402
from benchmarks.timing import CudaTimer, Timer  # noqa: E402
from benchmarks.warming import num_processes, warm, warm_in_processes  # noqa: E402
from benchmarks.working import work  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 460.0
COMPILING_SHARE = {"measure": 0.2, "tune": 0.5}
"""Of the budget, at most."""

NO_GPU = "no GPU here: these benchmarks need one that torch can use (torch.cuda.is_available())"


@dataclass(frozen=True, slots=True)
class Machine:
    """What is measured on; a test plays another than the GPU.

    Attributes:
        is_there: whether it can be used.
        device: of the inputs.
        name: for the results file.
        timer: made in the measuring process.
        scale: of the problems.
        program: starts this program again.
    """

    is_there: Callable[[], bool] = torch.cuda.is_available
    device: str = "cuda"
    name: Callable[[], str] = torch.cuda.get_device_name
    timer: Callable[[], Timer] = CudaTimer
    scale: Scale = "real"
    program: tuple[str, ...] = (sys.executable, __file__)


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    """Measure, print, write; 2 without a GPU, 1 if an operation failed."""
    options, machine = _parser().parse_args(arguments), machine or Machine()
    if not machine.is_there():
        print(NO_GPU, file=sys.stderr)
        return 2
    benchmarks = list(suite.benchmarks(options.only, machine.scale))
    if options.tune:
        benchmarks = tune.tunings(benchmarks)
    with torch.no_grad():
        if options.warm is not None:
            part, parts = map(int, options.warm.split("/"))
            warm(benchmarks, torch.device(machine.device), part, parts)
            return 0
        if options.journal is not None:
            return _work(benchmarks, options, machine)
    return _supervise(benchmarks, options, machine)


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="OP",
        choices=suite.OPERATIONS,
        default=suite.OPERATIONS,
        help=f"of {', '.join(suite.OPERATIONS)}",
    )
    parser.add_argument("--tune", action="store_true", help="time candidate configurations")
    parser.add_argument("-o", "--output", type=Path, help="JSON file, default results/DEVICE.json")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for the whole run")
    parser.add_argument(
        "--sample-seconds", type=float, default=None, help="of samples for each implementation"
    )
    parser.add_argument("--commit", help="of the code, where git cannot say")
    parser.add_argument(
        "--compilers", type=int, default=num_processes(), help="processes that compile ahead"
    )
    parser.add_argument("--warm", metavar="I/N", help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser


def _work(benchmarks: Sequence[Benchmark], options: argparse.Namespace, machine: Machine) -> int:
    """The measuring process."""
    device, timer = torch.device(machine.device), machine.timer()
    journal = Journal.read(options.journal)
    if journal.ceilings is None:
        environment = this_environment(device, options.commit)
        journal.start(environment, measure_ceilings(device, timer, machine.scale))
    assert journal.ceilings is not None and journal.environment is not None
    seconds = options.sample_seconds or (0.05 if options.tune else 0.2)
    bench = Bench(device, timer, journal.ceilings, journal.environment, seconds)
    return work(benchmarks, bench, journal, options.deadline, tell=_tell)


def _supervise(
    benchmarks: Sequence[Benchmark], options: argparse.Namespace, machine: Machine
) -> int:
    """The process that was called."""
    began = time.time()
    ending = "-tuning.json" if options.tune else ".json"
    name = file_name(machine.name()).removesuffix(".json") + ending
    output: Path = options.output or RESULTS / name
    output.parent.mkdir(parents=True, exist_ok=True)
    # Anew for each: a broken device takes its process with it.
    command = [*machine.program, *_passed_on(options)]
    notes = [f"The goals were set for an {SET_FOR}."] * (not options.tune)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        deadline = began + options.seconds

        def write(journal: Journal) -> None:
            if journal.environment is not None:
                report = _report(journal, time.time() - began, notes, options)
                output.write_text(_document(benchmarks, report, options), encoding="utf-8")

        if options.compilers:
            share = COMPILING_SHARE["tune" if options.tune else "measure"]
            notes.append(warm_in_processes(command, options.compilers, share * options.seconds))
            print(notes[-1], flush=True)
        command += ["--journal", str(path), "--deadline", str(deadline)]
        try:
            journal = supervise(command, benchmarks, path, deadline, write)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        write(journal)
    assert journal.environment is not None
    if options.tune:
        found = tune.winners(benchmarks, journal.rows)
        page = tune.notes(journal.environment, found)
        output.with_suffix(".md").write_text(page, encoding="utf-8")
        print(page)
    else:
        print(table(_report(journal, time.time() - began, notes, options)))
    print(f"written: {output}")
    return int(any(row.status == "failed" for row in journal.rows if row.implementation == OURS))


def _passed_on(options: argparse.Namespace) -> list[str]:
    words = ["--only", *options.only]
    words += ["--tune"] * options.tune
    if options.sample_seconds is not None:
        words += ["--sample-seconds", str(options.sample_seconds)]
    if options.commit is not None:
        words += ["--commit", options.commit]
    return words


def _report(
    journal: Journal, seconds: float, notes: Sequence[str], options: argparse.Namespace
) -> Report:
    assert journal.environment is not None
    wanted = [] if options.tune else [g for g in GOALS if g.row.operation in options.only]
    return Report(
        environment=journal.environment,
        ceilings=journal.ceilings,
        rows=journal.rows,
        goals=evaluate(journal.rows, wanted),
        seconds=seconds,
        notes=tuple(notes),
    )


def _document(benchmarks: Sequence[Benchmark], report: Report, options: argparse.Namespace) -> str:
    if not options.tune:
        return to_json(report)
    best = [asdict(winner) for winner in tune.winners(benchmarks, report.rows)]
    return json.dumps({**json.loads(to_json(report)), "winners": best}, indent=1) + "\n"


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
