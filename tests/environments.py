"""Builds the consumers' environments: ``python tests/environments.py [NAME ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmopt.bench.environments import BuildError, Environment, build, frozen_environment
from llmopt.bench.peers import REQUIREMENTS

INTEROP_ENVIRONMENTS = ("transformers", "vllm", "gptqmodel", "archived", "llama-cpp")


def consumer_environment(name: str) -> Environment:
    """The environment of a consumer; one that is a peer of the benchmark too has the peer's."""
    own = Path(__file__).parent / "interop" / "requirements"
    return frozen_environment(name, own if (own / f"{name}.txt").is_file() else REQUIREMENTS)


def main(names: Sequence[str]) -> int:
    """Build the named consumers' environments; the tests of one that cannot be had will fail."""
    for name in names or INTEROP_ENVIRONMENTS:
        try:
            print(f"{name}: {build(consumer_environment(name))}", flush=True)
        except (BuildError, OSError) as error:
            print(f"{name}: environment could not be built: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
