"""Who is benchmarked: where it is installed, what drives it, what it can do."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from llmopt.bench.environments import BuildError, build, frozen_environment
from llmopt.bench.naming import known

Method = Literal["rtn", "gptq", "awq"]
METHODS: tuple[Method, ...] = get_args(Method)
REQUIREMENTS = Path(__file__).parent / "requirements"


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A program that turns a checkpoint into an INT4 one.

    Attributes:
        name: as the command line and the rows call it.
        module: its file in ``runners``.
        methods: what it can do, and whether a peer does it symmetrically (its users' default).
        environment: name of its file in ``requirements``; none means the running interpreter.
        variables: environment variables that it needs; ``{threads}`` is filled in.
        recipes: llmopt's recipe for each method.
    """

    name: str
    module: str
    methods: Mapping[Method, bool]
    environment: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    recipes: Mapping[Method, str] = field(default_factory=dict)

    def python(self) -> Path:
        """The interpreter to run it with; builds its environment where there is none yet.

        Raises:
            BuildError: the registry or the disk would not let it be built.
        """
        if self.environment is None:
            return Path(sys.executable)
        try:
            return build(frozen_environment(self.environment, REQUIREMENTS))
        except OSError as error:
            raise BuildError(f"{self.environment}: {error}") from error


LLMOPT = Quantizer(
    "llmopt",
    "run_llmopt",
    {"rtn": True, "gptq": True, "awq": False},
    recipes={"rtn": "int4-rtn", "gptq": "int4-gptq", "awq": "int4-awq"},
)
PEERS: Mapping[str, Quantizer] = {
    "llm-compressor": Quantizer(
        "llm-compressor",
        "run_llm_compressor",
        {"gptq": True, "awq": False},
        environment="llm-compressor",
    ),
    "gptqmodel": Quantizer(
        "gptqmodel",
        "run_gptqmodel",
        {"gptq": True},
        environment="gptqmodel",
        # Its own number of workers is too small on two processors for its own check of it.
        variables={"GPTQMODEL_CPU_WORKERS": "{threads}"},
    ),
}


def find_peers(names: Sequence[str]) -> list[Quantizer]:
    """The peers of these names, each once.

    Raises:
        BadInputError: unknown name (with the nearest one).
    """
    return [PEERS[known(name, list(PEERS), "peer")] for name in dict.fromkeys(names)]


def check_method(name: str) -> Method:
    """The method of this name.

    Raises:
        BadInputError: unknown name (with the nearest one).
    """
    return cast(Method, known(name, METHODS, "method"))
