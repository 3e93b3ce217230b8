"""A decode engine's process, asked and heard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llmopt.bench.decode.workloads import Workload
from llmopt.bench.environments import clean_variables
from llmopt.bench.measuring import RUNNERS, RunError

SESSION = "decode_session.py"
_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What an engine is asked.

    Attributes:
        model: a checkpoint's folder or a GGUF file.
        is_packed: whether it is a checkpoint whose linear layers are packed.
        kv: the cache's elements.
        variant: which of the engine's ways to decode.
        dtype: of activations and 16-bit weights, as torch calls it.
        device: ``cpu`` or ``cuda``.
        threads: of torch and its libraries.
        vocabulary: size of.
        max_context: tokens of the longest request.
        max_sequences: the most requests at once.
        kv_bytes: of the largest workload's 16-bit cache.
        workloads: in order.
        options: what only this engine's runner knows.
    """

    model: str
    is_packed: bool
    kv: str
    variant: str
    dtype: str
    device: str
    threads: int
    vocabulary: int
    max_context: int
    max_sequences: int
    kv_bytes: int
    workloads: tuple[Workload, ...]
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Opened:
    """What an engine says once it stands.

    Attributes:
        load_s: seconds that took.
        own_rss_bytes: resident memory after the imports, before the model was opened.
        versions: of its packages.
        notes: what a reader must know.
    """

    load_s: float
    own_rss_bytes: int
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """What it says of a workload.

    Attributes:
        name: the workload's.
        times_s: of every run and request, when each token was known.
        tokens: of every request, in the first run that counts.
        peak_bytes: highest resident memory during the runs; of a GPU, highest allocated.
        gaps: by how much the best logit led at every token, of the reference.
        noise: by how much another batch shape moves such a lead, likewise.
        error: why there is none of it.
    """

    name: str
    times_s: list[list[list[float]]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    peak_bytes: int = 0
    gaps: list[list[float]] | None = None
    noise: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Heard:
    """All that a process said.

    Attributes:
        opened: that it stands; none where it never did.
        answers: by workload, of those that it came to.
        failure: how it ended, if not well.
    """

    opened: Opened | None
    answers: dict[str, Answer]
    failure: str = ""

    def error(self, workload: str) -> str:
        """Why a workload has no numbers; empty where it has."""
        answer = self.answers.get(workload)
        if answer is None:
            return self.failure or "the engine ended without an answer"
        return answer.error


def ask(
    python: Path,
    module: str,
    request: DecodeRequest,
    folder: Path,
    runners: Path = RUNNERS,
    timeout_s: float | None = None,
) -> Heard:
    """Run an engine's process to its end, its papers and its log in ``folder``.

    Args:
        python: the interpreter of its environment.
        module: name of its file in ``runners``.
        request: what it is asked.
        folder: an empty folder; the process works in it.
        runners: folder of ``module``.
        timeout_s: after which it is ended; what it had answered counts.

    Raises:
        RunError: it answered what cannot be read.
    """
    asked, answered, log = (folder / f for f in ("request.json", "answers.jsonl", "log.txt"))
    asked.write_text(json.dumps(asdict(request)), "utf-8")
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    variables = {
        **clean_variables(),
        **dict.fromkeys(names, str(request.threads)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if runners != RUNNERS:
        variables["PYTHONPATH"] = str(runners)
    command = [python, RUNNERS / SESSION, module, asked.absolute(), answered.absolute()]
    failure = ""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_s)
        except BaseException as error:  # an interrupt must not leave an engine running
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            failure = f"ended after {timeout_s:.0f} s"
    if status and not failure:
        tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-_TAIL_LINES:]
        failure = f"{module} ended with status {status}:\n" + "\n".join(tail)
    text = answered.read_text("utf-8") if answered.is_file() else ""
    return hear(text, module, failure)


def hear(text: str, module: str, failure: str = "") -> Heard:
    """Read what a process wrote before it ended; a line without its end was cut short.

    Raises:
        RunError: a whole line that cannot be read.
    """
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        opened = TypeAdapter(Opened).validate_json(lines[0]) if lines else None
        answers = [TypeAdapter(Answer).validate_json(line) for line in lines[1:]]
    except ValidationError as error:
        raise RunError(f"{module} answered what cannot be read: {error}\n{failure}") from error
    return Heard(opened, {answer.name: answer for answer in answers}, failure)
