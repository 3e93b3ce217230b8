"""Starts the measuring process again when a kernel brought it down or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.benchmark import Benchmark
from benchmarks.journal import Journal

STALL_S = 100.0
"""Without a new line in the journal for so long, the process hangs."""

GRACE_S = 20.0
"""Past the deadline, for what was begun in time."""


def supervise(
    command: Sequence[str],
    benchmarks: Sequence[Benchmark],
    path: Path,
    deadline: float,
    on_progress: Callable[[Journal], None],
    *,
    stall_s: float = STALL_S,
    poll_s: float = 0.5,
) -> Journal:
    """Run ``command`` until the journal at ``path`` has every benchmark; returns the journal.

    A process that ends early or hangs costs the benchmark that it was at, which gets rows with
    the reason; the next process goes on behind it.

    Args:
        command: the measuring process; it reads the journal to know what is done.
        benchmarks: all of them.
        path: of the journal.
        deadline: in seconds since the epoch.
        on_progress: called with the journal whenever it grew.
        stall_s: after so long without a new line a process is ended.
        poll_s: between two looks.

    Raises:
        RuntimeError: the first process ended before it began anything; says its last words.
    """
    while True:
        before = len(Journal.read(path).began)
        reason = _run_once(command, path, deadline, on_progress, stall_s, poll_s)
        journal = Journal.read(path)
        if reason is None:
            return journal
        if journal.environment is None:
            raise RuntimeError(f"nothing was measured: {reason}")
        journal.close_broken(benchmarks, reason)
        on_progress(journal)
        hopeless = len(journal.began) == before or time.time() > deadline + GRACE_S
        if hopeless or len(journal.began) == len(benchmarks):
            journal.leave_out(benchmarks, f"not reached: {reason}")
            return journal
        print(f"starting anew: {reason}", flush=True)


def _run_once(
    command: Sequence[str],
    path: Path,
    deadline: float,
    on_progress: Callable[[Journal], None],
    stall_s: float,
    poll_s: float,
) -> str | None:
    """``None`` if the process came to its end, else why not."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        ended_because = None
        try:
            seen, seen_at = -1, time.time()
            while process.poll() is None:
                size = path.stat().st_size if path.exists() else 0
                if size != seen:
                    seen, seen_at = size, time.time()
                    on_progress(Journal.read(path))
                if time.time() - seen_at > stall_s:
                    ended_because = f"hung: nothing new for {stall_s:.0f} s"
                elif time.time() > deadline + GRACE_S:
                    ended_because = "the time was up"
                if ended_because:
                    break
                time.sleep(poll_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own group: compilers go with it
            status = process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
    if ended_because:
        return ended_because
    return None if status == 0 else f"the process ended with status {status}: {last}"
