"""Who decodes: the rows to be, in the order in which they run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmopt.bench.decode.workloads import CHECK, MIXED
from llmopt.bench.environments import (
    STAMP,
    BuildError,
    build,
    clean_variables,
    frozen_environment,
)
from llmopt.bench.naming import known
from llmopt.bench.peers import REQUIREMENTS

Weights = Literal["16-bit", "int4"]
WEIGHTS: tuple[Weights, ...] = ("16-bit", "int4")
KV_KINDS = ("16-bit", "fp8", "int8", "int4")
PEERS = ("transformers", "llama.cpp", "vllm")
LLMOPT, LLAMA_CPP = "llmopt", "llama.cpp"
_CPU_ALONE = 3
CELLS = "cells"
"""Stands for all workloads of a batch and a context."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An engine with one kind of weights and one kind of cache, in a process of its own.

    Attributes:
        engine: its name.
        module: its file in ``runners``.
        weights: ``16-bit``, ``int4``, or a kind of GGUF file.
        kv: the cache's elements.
        variant: which of an engine's ways to decode.
        environment: name of its requirements; none means the running interpreter.
        is_built_on_demand: otherwise it is used only where it is there.
        reference: weights of the reference that its tokens are compared with; none if nobody
            else has the same weights.
        workloads: what it runs beside the check.
        options: what only its runner knows.
        gpu_check: Python that ends with status 3 in an environment built for the CPU alone.
    """

    engine: str
    module: str
    weights: str
    kv: str = "16-bit"
    variant: str = ""
    environment: str | None = None
    is_built_on_demand: bool = True
    reference: str | None = None
    workloads: tuple[str, ...] = (CELLS, MIXED)
    options: dict[str, str] = field(default_factory=dict)
    gpu_check: str = ""

    @property
    def name(self) -> str:
        """The engine with its variant."""
        return f"{self.engine} ({self.variant})" if self.variant else self.engine

    @property
    def owes_tokens(self) -> bool:
        """Whether its tokens are the reference's but for rounding: nothing of it is quantized."""
        return self.engine == LLMOPT and self.weights == self.kv == "16-bit"

    def runs(self, workload: str) -> bool:
        """Whether a workload is one of its own."""
        kind = workload if workload in (CHECK, MIXED) else CELLS
        return kind == CHECK or kind in self.workloads

    def python(self) -> Path:
        """The interpreter to run it with.

        Raises:
            BuildError: its environment is not there, or could not be built.
        """
        if self.environment is None:
            return Path(sys.executable)
        environment = frozen_environment(self.environment, REQUIREMENTS)
        if not self.is_built_on_demand and not (environment.folder / STAMP).is_file():
            raise BuildError(f"there is no environment {environment.folder}")
        try:
            return build(environment)
        except OSError as error:
            raise BuildError(f"{self.environment}: {error}") from error

    def check_device(self, python: Path, kind: str) -> None:
        """Hold that an interpreter's engine computes on ``cpu`` or ``cuda``.

        Raises:
            BuildError: it was built for the CPU alone, so that its rows would be of that.
        """
        if kind == "cpu" or not self.gpu_check:
            return
        asked = subprocess.run(
            [python, "-c", self.gpu_check],
            env=clean_variables(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if asked.returncode == _CPU_ALONE:
            raise BuildError(f"{self.engine} is built for the CPU alone in {python.parent.parent}")
        if asked.returncode:
            told = asked.stderr.decode(errors="replace").strip()
            raise BuildError(f"{self.engine} cannot tell whether it computes on {kind}: {told}")


def plan_entries(
    weights: Sequence[str], kvs: Sequence[str], peers: Sequence[str], gguf: Sequence[str]
) -> list[Entry]:
    """The reference of every kind of weights, then llmopt, then the other engines.

    Args:
        weights: of checkpoints, the first of them plain.
        kvs: caches of llmopt's engine; llama.cpp and vLLM get those they have.
        peers: beside llmopt.
        gguf: kinds of files for llama.cpp.
    """
    with_transformers = "transformers" in peers
    entries = [
        Entry(
            "transformers",
            "decode_transformers",
            kind,
            variant="dynamic",
            workloads=(CELLS, MIXED) if with_transformers else (),
        )
        for kind in weights
    ]
    entries += [
        Entry(LLMOPT, "decode_llmopt", kind, kv, reference=kind) for kind in weights for kv in kvs
    ]
    if with_transformers:
        ways = (("static", (CELLS,)), ("sequential", (MIXED,)), ("continuous", (CELLS, MIXED)))
        entries += [
            Entry(
                "transformers",
                "decode_transformers",
                kind,
                variant=variant,
                reference=kind,
                workloads=workloads,
            )
            for kind in weights
            for variant, workloads in ways
            if kind == "16-bit" or variant == "sequential"
        ]
    if LLAMA_CPP in peers:
        entries += [_llama_cpp(kind, kv) for kind in gguf for kv in _shared(kvs, kind)]
    if "vllm" in peers:
        entries += [
            Entry(
                "vllm",
                "decode_vllm",
                kind,
                environment="vllm",
                is_built_on_demand=False,
                gpu_check="from vllm.platforms import current_platform as p; "
                "raise SystemExit(3 * (not p.is_cuda()))",
                reference=kind,
            )
            for kind in weights
        ]
    return entries


def check_choices(names: Sequence[str], choices: Sequence[str], kind: str) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        BadInputError: unknown name (with the nearest one).
    """
    return tuple(known(name, choices, kind) for name in dict.fromkeys(names))


def _llama_cpp(kind: str, kv: str) -> Entry:
    plain = kind in ("BF16", "F16", "F32")
    return Entry(
        LLAMA_CPP,
        "decode_llama_cpp",
        kind,
        kv,
        environment="llama-cpp",
        gpu_check="import llama_cpp as l; "
        "raise SystemExit(3 * (not l.llama_supports_gpu_offload()))",
        reference="16-bit" if plain else None,
    )


def _shared(kvs: Sequence[str], kind: str) -> list[str]:
    """Caches of llmopt's that llama.cpp has too; beside quantized weights the plain one alone."""
    has = [kv for kv in kvs if kv in ("16-bit", "int8", "int4")]
    return has if kind == "BF16" else ["16-bit"]
