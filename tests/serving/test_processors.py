from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmopt.serving.processors import physical_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three cores of two threads each; this process may use five of the six threads."""
    for processor, siblings in enumerate(("0,3", "1,4", "2,5") * 2):
        folder = tmp_path / f"devices/system/cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n", "ascii")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    return tmp_path


def limit(machine: Path, text: str) -> None:
    (machine / "fs/cgroup").mkdir(parents=True)
    (machine / "fs/cgroup/cpu.max").write_text(text, "ascii")


def test_two_threads_of_a_core_count_once(machine: Path) -> None:
    assert physical_cores(machine) == 3


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000\n", 2), ("50000 100000", 1), ("max 100000", 3)]
)
def test_a_containers_limit_holds(machine: Path, text: str, cores: int) -> None:
    limit(machine, text)
    assert physical_cores(machine) == cores


def test_processors_count_where_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert physical_cores(tmp_path) == 5
