"""Run a script of this project in an environment with the oldest triton that is supported.

``python kernels/aot/with_oldest_triton.py SCRIPT [ARGUMENT ...]`` builds the environment first (it
is cached) and exits as the script does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmopt.bench.environments import Environment, build, clean_variables

REQUIREMENTS = Path(__file__).with_name("oldest_triton.txt")


def main(command: Sequence[str]) -> int:
    """Build the environment and run the command in it."""
    content = REQUIREMENTS.read_text("utf-8")
    pins = [line for line in content.splitlines() if "==" in line]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    steps = ((torch,), tuple(pin for pin in pins if pin != torch))
    python = build(Environment("oldest-triton", steps, content))
    return subprocess.run([str(python), *command], env=clean_variables()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
