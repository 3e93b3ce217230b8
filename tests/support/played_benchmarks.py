"""The benchmark's program on a machine that is played: small problems, a CPU, times made up."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests")]
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from support.kernels_benchmarks import FakeTimer  # noqa: E402

from benchmarks import run, suite  # noqa: E402
from benchmarks.benchmark import Prepared  # noqa: E402

MACHINE = run.Machine(
    is_there=lambda: True,
    device="cpu",
    name=lambda: "Played 1",
    timer=FakeTimer,
    scale="tiny",
    program=(sys.executable, __file__),
)


def with_a_crash(operations, scale):
    """Every problem of the suite, the second of which brings its process down."""
    for index, benchmark in enumerate(real(operations, scale)):
        if index == 1:
            object.__setattr__(benchmark, "ours", lambda _: Prepared(lambda: os._exit(9)))
        yield benchmark


real = suite.benchmarks
if __name__ == "__main__":
    torch.set_num_threads(1)
    suite.benchmarks = with_a_crash
    sys.exit(run.main(sys.argv[1:], MACHINE))
