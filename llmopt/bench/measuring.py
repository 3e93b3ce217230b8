"""A subprocess, its time and its memory, from outside and from within."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llmopt.bench.environments import clean_variables

RUNNERS = Path(__file__).parent / "runners"
_SAMPLING_S = 0.02
_TAIL_LINES = 15


class RunError(Exception):
    """The quantizer ended without an answer; says how, with the last lines it printed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What every quantizer is asked alike.

    Attributes:
        model: folder of the source.
        output: folder to write; does not exist yet.
        token_ids: calibration blocks, ``(samples, length)``.
        method: ``rtn``, ``gptq`` or ``awq``.
        bits: of a weight.
        group_size: input columns that share a scale; none is one scale a row.
        symmetric: whether no zero points are stored.
        threads: of torch and its libraries.
        options: what only this quantizer knows, such as llmopt's recipe.
    """

    model: str
    output: str
    token_ids: list[list[int]]
    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    threads: int
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileRequest:
    """The same of one GGUF file that becomes another, by ``llmopt bench gguf``.

    Attributes:
        model: folder of the checkpoint that ``source`` was written from.
        source: the file, F32.
        imatrix: an importance matrix in llama.cpp's GGUF layout.
        hessians: folder of the second moments behind it.
        output: file to write; does not exist yet.
        file_type: llama.cpp's number of the mixture.
        pure: whether every matrix gets the mixture's base type.
        types: of every tensor, by name, as llama.cpp's rules give them.
        method: ``compatible``, ``least-squares`` or ``gptq``; llama.cpp knows one way.
        threads: of the quantizer.
    """

    model: str
    source: str
    imatrix: str
    hessians: str
    output: str
    file_type: int
    pure: bool
    types: dict[str, str]
    method: str
    threads: int


@dataclass(frozen=True, slots=True)
class Response:
    """What a quantizer's own process tells.

    Attributes:
        import_s: seconds that its imports took.
        own_rss_bytes: resident memory after them, before the model is opened.
        own_anonymous_bytes: of that, what is not pages of files.
        peak_rss_bytes: highest resident memory until the end.
        quantize_s: seconds from the loaded model to the written one.
        versions: of its packages.
        phases_s: parts of ``quantize_s``, where the quantizer tells them.
        notes: what a reader of the row must know.
        peaks_bytes: highest resident memory that is not pages of files, by step, where told.
    """

    import_s: float
    own_rss_bytes: int
    own_anonymous_bytes: int
    peak_rss_bytes: int
    quantize_s: float
    versions: dict[str, str]
    phases_s: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peaks_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoadRequest:
    """The whole road, gate included, by ``llmopt bench road``.

    Attributes:
        model: folder of the source.
        output: folder that appears if the gate passes; does not exist yet.
        recipe: name or file.
        num_samples: calibration blocks, instead of the recipe's.
        length: tokens of each, instead of the recipe's.
        threads: of torch.
    """

    model: str
    output: str
    recipe: str
    num_samples: int
    length: int
    threads: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        wall_s: from the start of the process to its end, imports included.
        cpu_s: user and system time of it and of its children.
        peak_anonymous_bytes: highest resident memory that is not pages of files, sampled.
        response: what it told itself.
    """

    wall_s: float
    cpu_s: float
    peak_anonymous_bytes: int
    response: Response


def measure(
    python: Path,
    module: str,
    request: Request | FileRequest | RoadRequest,
    folder: Path,
    variables: Mapping[str, str],
    runners: Path = RUNNERS,
) -> Measurement:
    """Run a quantizer once, with its papers and its output's log in ``folder``.

    Args:
        python: the interpreter of its environment.
        module: name of its file in ``runners``.
        request: what it is asked.
        folder: an empty folder; the process works in it.
        variables: environment variables on top of ours.
        runners: folder of ``module`` and ``session.py``.

    Raises:
        RunError: it failed, or answered nothing that can be read.
    """
    asked, answered, log = (folder / f for f in ("request.json", "response.json", "log.txt"))
    asked.write_text(json.dumps(asdict(request)), "utf-8")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(request.threads))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, RUNNERS / "session.py", module, asked.absolute(), answered.absolute()]
    if runners != RUNNERS:
        offline["PYTHONPATH"] = str(runners)
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**clean_variables(), **threads, **offline, **variables},
            start_new_session=True,
        )
        with _Sampler(process.pid) as sampler:
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:  # an interrupt must not leave a peer running
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.monotonic() - started
    if process.returncode or not answered.is_file():
        tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-_TAIL_LINES:]
        raise RunError(f"{module} ended with status {process.returncode}:\n" + "\n".join(tail))
    try:
        response = TypeAdapter(Response).validate_json(answered.read_bytes())
    except ValidationError as error:
        raise RunError(f"{module} answered what cannot be read: {error}") from error
    return Measurement(wall_s, usage.ru_utime + usage.ru_stime, sampler.peak_bytes, response)


class _Sampler:
    """Watches the anonymous memory of a process from a thread while the context lasts."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLING_S):
            try:
                text = self._status.read_text("ascii", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                return  # it has ended
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)
