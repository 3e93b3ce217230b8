"""Isolated virtual environments, built once and kept outside the checkout.

An environment is named by a hash of what is installed in it, so changing its requirements builds a
new one. It counts as built only once its stamp is written, which is the last step: an interrupted
build is removed and begun again by the next caller. A lock lets one process build at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STAMP = ".built"
BUILD_TOOLS = ("setuptools==", "wheel==")


class BuildError(Exception):
    """The package registry or the disk would not let an environment be built."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed in a virtual environment.

    Attributes:
        name: first part of its folder's name.
        steps: arguments of ``pip install``, one tuple a call, in order.
        content: text that the steps read from files; part of the hash.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    content: str

    @property
    def folder(self) -> Path:
        """Where it lies: ``$XDG_CACHE_HOME/llmopt/environments/NAME-HASH``."""
        told = f"{sys.version_info[:2]} {sys.platform} {self.content}"
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        return cache_folder() / "environments" / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


def cache_folder() -> Path:
    """Where llmopt keeps what can be made again: ``$XDG_CACHE_HOME/llmopt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmopt"


def frozen_environment(name: str, requirements: Path) -> Environment:
    """The environment of ``requirements/NAME.txt``, which lists every package with its version.

    torch, where it is listed, goes first and with its dependencies, since they differ between its
    builds; the rest is installed exactly as listed. Where the file pins setuptools and wheel, they
    go before the rest, which may have to be built with them and with torch.
    """
    file = requirements / f"{name}.txt"
    content = file.read_text("utf-8")
    pins = [line.strip() for line in content.splitlines()]
    torch = [(pin,) for pin in pins if pin.startswith("torch==")]
    tools = tuple(pin for pin in pins if pin.startswith(BUILD_TOOLS))
    rest = ("--no-deps", "--requirement", str(file))
    if len(tools) < len(BUILD_TOOLS):
        return Environment(name, (*torch, rest), content)
    steps = (*torch, ("--no-deps", *tools), ("--no-build-isolation", *rest))
    return Environment(name, steps, content)


def build(environment: Environment) -> Path:
    """Build an environment, or find it built, and return its interpreter.

    Raises:
        BuildError: with the last lines that the failing step printed.
    """
    folder = environment.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not (folder / STAMP).is_file():
            if folder.exists():
                shutil.rmtree(folder)
            print(f"building the environment {folder} ...", file=sys.stderr, flush=True)
            try:
                _install(environment)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)  # a disk that is full must not stay so
                raise
    return environment.python


def _install(environment: Environment) -> None:
    _run([sys.executable, "-m", "venv", str(environment.folder)])
    for step in environment.steps:
        _run([str(environment.python), "-m", "pip", "install", "--quiet", *step])
    (environment.folder / STAMP).write_text(environment.content, "utf-8")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=clean_variables()
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildError(f"{' '.join(command)}\n{tail}")


def clean_variables() -> dict[str, str]:
    """This process's environment variables, less those that lead Python back to the checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
