"""Checkpoints to break, a disk that is full, and processes that die at a chosen step."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Header = Mapping[str, object]
STEPS = ("write", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")


class MakeCheckpoint(Protocol):
    def __call__(self, path: Path, *shards: dict[str, Tensor], config: object = ...) -> Path: ...


class RunAndKill(Protocol):
    def __call__(
        self, step: int, root: Path, action: Callable[[], object], *, power_cut: bool = ...
    ) -> bool: ...


@pytest.fixture
def make_checkpoint() -> MakeCheckpoint:
    def make(path: Path, *shards: dict[str, Tensor], config: object = None) -> Path:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
        if len(shards) == 1:
            save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
            return path
        weight_map: dict[str, str] = {}
        for i, tensors in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            save_file(tensors, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    return make


@pytest.fixture
def two_shards(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(
        tmp_path / "source",
        {
            "a": torch.arange(15, dtype=torch.bfloat16).view(3, 5),
            "b": torch.arange(7),
            "d": torch.ones(1),
        },
        {"c": torch.ones(2, 3, dtype=torch.float16)},
    )


@pytest.fixture
def write_raw() -> Callable[[Path, Header | bytes, int], Path]:
    """Writes a safetensors file from any header and so many zero bytes (a hole in the file)."""

    def write(path: Path, header: Header | bytes, num_bytes: int) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + num_bytes)
        return path

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory where one file cannot pass 1 MiB: a tmpfs where one may be mounted."""
    disk = tmp_path / "small-disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if mounted:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def run_and_kill(monkeypatch: pytest.MonkeyPatch) -> RunAndKill:
    """Runs an action in a process that SIGKILLs itself at the n-th change it makes to the disk.

    A write is torn in the middle; an fsync counts as one and, for speed, does nothing else. With
    ``power_cut``, files below ``root`` that were written and not fsynced lose their second half.
    Says whether the process was killed before its end.
    """

    monkeypatch.setattr(os, "fsync", lambda _: None)

    def run(
        step: int, root: Path, action: Callable[[], object], *, power_cut: bool = False
    ) -> bool:
        with warnings.catch_warnings():
            # Python 3.12 warns of threads at a fork; the child only handles files.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                _die_at(step, root if power_cut else None)
                action()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        assert os.waitstatus_to_exitcode(status) == 0
        return False

    return run


def _die_at(step: int, root: Path | None) -> None:
    """Replaces the functions that change the disk, in this process, for good."""
    dirty: set[int] = set()
    real_write, truncate, done = os.write, os.truncate, 0

    def die() -> None:
        for folder, _, files in os.walk(root) if root is not None else ():
            for path in (os.path.join(folder, name) for name in files):
                if os.stat(path).st_ino in dirty:
                    truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal done
            done += 1
            if name == "write":
                descriptor, block = args
                assert isinstance(descriptor, int) and isinstance(block, bytes | memoryview)
                dirty.add(os.fstat(descriptor).st_ino)
                if done == step:
                    real_write(descriptor, block[: len(block) // 2])
            if done == step:
                die()
            result = real(*args, **kwargs)
            if name == "fsync":
                descriptor = args[0]
                assert isinstance(descriptor, int)
                dirty.discard(os.fstat(descriptor).st_ino)
            return result

        return call

    for name in STEPS:
        setattr(os, name, counted(name))
