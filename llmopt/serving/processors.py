"""How many threads an engine does well to compute with."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM = Path("/sys")


def physical_cores(system: Path = SYSTEM) -> int:
    """Processor cores that this process may use, two threads of one core counted once.

    Args:
        system: where Linux describes the machine; elsewhere the logical processors are counted.
    """
    allowed = _allowed_processors()
    cores = {_siblings(system, processor) for processor in allowed}
    quota = _quota(system)
    return max(1, len(cores) if quota is None else min(len(cores), quota))


def _allowed_processors() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on every system
        return set(range(os.cpu_count() or 1))


def _siblings(system: Path, processor: int) -> str:
    """What names the core of a processor: the list of its hardware threads, else itself."""
    file = system / f"devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    return _read(file) or str(processor)


def _quota(system: Path) -> int | None:
    """Whole processors that the container's limit is worth, ``None`` without a limit."""
    limit, _, period = _read(system / "fs/cgroup/cpu.max").partition(" ")
    if not limit.isdigit() or not period.isdigit():
        return None
    return max(1, int(limit) // int(period))


def _read(file: Path) -> str:
    try:
        return file.read_text("ascii").strip()
    except OSError:
        return ""
