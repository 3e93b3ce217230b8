"""Compile ahead, in several processes: what they compile lies on disk when it is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence

import torch

from benchmarks.benchmark import OURS, Benchmark
from benchmarks.working import in_order

MAX_PROCESSES = 8  # each holds the inputs of a problem on the GPU, and a core


def num_processes() -> int:
    """One for every two cores; none where there are few."""
    cores = os.cpu_count() or 1
    return min(MAX_PROCESSES, cores // 2) if cores >= 4 else 0


def warm(benchmarks: Sequence[Benchmark], device: torch.device, part: int, parts: int) -> None:
    """Run every implementation of one part of the benchmarks once; what fails here is not told.

    The measuring process meets the same failure, and makes a row of it.
    """
    for benchmark in in_order(benchmarks)[part::parts]:
        try:
            inputs = benchmark.build(device, 0)
        except Exception:
            continue
        for make in {OURS: benchmark.ours, **benchmark.peers}.values():
            try:
                make(inputs).call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception:
                continue
        del inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()


def warm_in_processes(command: Sequence[str], count: int, seconds: float) -> str:
    """Run ``command --warm I/count`` for every I at once, for ``seconds``; says how it went.

    Args:
        command: of this program.
        count: processes.
        seconds: at most.
    """
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [*command, "--warm", f"{i}/{count}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for i in range(count)
    ]
    for process in processes:
        try:
            process.wait(max(0.0, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: compilers go with it
            process.wait()
    good = sum(process.returncode == 0 for process in processes)
    took = time.monotonic() - began
    return f"compiled ahead in {took:.0f} s: {good} of {count} processes came to their end"
