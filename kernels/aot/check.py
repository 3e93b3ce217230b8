"""Compile the kernels ahead of time and fail on what a chip cannot bear.

``python kernels/aot/check.py [--all] [--chip 80 --chip 90 --chip gfx942] [OPERATION ...]``: without
``--all`` only the shipped configurations. Prints a row a kernel: registers, stack, shared memory,
processor seconds of its launch. Exits with 1 if a kernel has a fault.

With ``--cpu-budget SECONDS`` it exits with 1 too if everything took more of the processors' time
than that, and compiles everything anew: what triton's cache gives takes none. It is their time and
not the clock's, since that is longer on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import pkgutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(KERNELS))
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
import triton  # noqa: E402

from aot import cases  # noqa: E402
from aot.chips import CHIPS, Usage, usage, use  # noqa: E402
from llmopt_kernels.launching import compiling  # noqa: E402

DEFAULT_CHIPS = ("80", "90")


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled kernel, or one launch that could not be compiled.

    ``cpu_seconds`` are those of the whole launch.
    """

    case: str
    chip: str
    kernel: str
    usage: Usage | None
    cpu_seconds: float
    faults: tuple[str, ...]

    def __str__(self) -> str:
        """A line of the table."""
        used = ""
        if self.usage is not None:
            u = self.usage
            used = f"{u.registers:4d} reg {u.stack_bytes:5d} stack {u.shared_bytes:7d} shared"
        word = "; ".join(self.faults) or "ok"
        seconds = f"{self.cpu_seconds:5.1f} s"
        return f"{self.chip:>7} {self.case:60} {self.kernel:36} {used} {seconds}  {word}"


def operations() -> list[str]:
    """Every operation that has cases."""
    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


def compile_operation(operation: str, chip_name: str, everything: bool) -> list[Row]:
    """Compile the cases of one operation for one chip."""
    chip = CHIPS[int(chip_name) if chip_name.isdigit() else chip_name]
    use(chip)
    rows: list[Row] = []
    for case in importlib.import_module(f"aot.cases.{operation}").cases():
        if not (case.runs_on(chip.capability) and (everything or case.shipped)):
            continue
        started = _cpu_seconds()
        try:
            with compiling() as kernels:
                case.launch()
        except Exception as error:  # noqa: BLE001  (a row of the table: the compiler raises anything)
            seconds = _cpu_seconds() - started
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rows.append(Row(case.name, chip_name, "", None, seconds, (text,)))
            continue
        seconds = _cpu_seconds() - started
        if not kernels:
            rows.append(Row(case.name, chip_name, "", None, seconds, ("it launched nothing",)))
        used = [usage(kernel, chip) for kernel in kernels]
        # Of several kernels of one launch, a product and the reduction after it say, those that
        # bear the product's name must have it: all of them.
        names = [kernel.metadata.name for kernel in kernels]
        products = {name for name, u in zip(names, used, strict=True) if u.tensor_cores}
        owed = (products or set(names)) if case.tensor_cores else set()
        for name, u in zip(names, used, strict=True):
            faults = tuple(u.faults(chip, name in owed))
            rows.append(Row(case.name, chip_name, name, u, seconds, faults))
    return rows


def _cpu_seconds() -> float:
    """Processor time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def compile_all(names: Sequence[str], chips: Sequence[str], everything: bool) -> Iterator[Row]:
    """Compile everything asked for, several processes at a time."""
    context = get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context) as pool:
        jobs = [
            pool.submit(compile_operation, name, chip, everything)
            for name in names
            for chip in chips
        ]
        for job in jobs:
            yield from job.result()


def main() -> int:
    """Print the table; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("operations", nargs="*", metavar="OPERATION")
    parser.add_argument("--all", action="store_true", help="tuning candidates too")
    parser.add_argument("--chip", action="append", choices=[str(name) for name in CHIPS])
    parser.add_argument("--cpu-budget", type=float, metavar="SECONDS", default=math.inf)
    asked = parser.parse_args()
    unknown = set(asked.operations) - set(operations())
    if unknown:
        parser.error(f"unknown operations {sorted(unknown)}; choose among {operations()}")
    if asked.cpu_budget < math.inf:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    started = time.perf_counter()
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    rows = []
    for row in compile_all(
        asked.operations or operations(), asked.chip or DEFAULT_CHIPS, asked.all
    ):
        print(row, flush=True)
        rows.append(row)
    faulty = [row for row in rows if row.faults]
    elapsed, spent = time.perf_counter() - started, _cpu_seconds()
    took = f"{elapsed:.0f} s, {spent:.0f} s of processor time"
    print(f"{len(rows)} kernels, {len(faulty)} with faults, {took}")
    for row in faulty:
        print(row)
    if spent > asked.cpu_budget:
        print(f"more than the budget of {asked.cpu_budget:g} s of processor time: ship fewer cases")
    return 1 if faulty or not rows or spent > asked.cpu_budget else 0


if __name__ == "__main__":
    sys.exit(main())
