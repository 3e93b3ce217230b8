"""Builds the consumers' environments: ``python tests/environments.py [NAME ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmopt.bench.environments import BuildError, build, frozen_environment

REQUIREMENTS_FOLDER = Path(__file__).parent / "interop" / "requirements"
INTEROP_ENVIRONMENTS = ("transformers", "vllm", "gptqmodel", "archived")


def main(names: Sequence[str]) -> int:
    """Build the named consumers' environments; one that cannot be had is told, not fatal."""
    for name in names or INTEROP_ENVIRONMENTS:
        try:
            print(f"{name}: {build(frozen_environment(name, REQUIREMENTS_FOLDER))}", flush=True)
        except (BuildError, OSError) as error:
            print(f"{name}: environment could not be built: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
