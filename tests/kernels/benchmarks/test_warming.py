"""Compiling ahead: every implementation once, whatever fails."""

import sys

import torch
from support.kernels_benchmarks import double

from benchmarks.benchmark import Prepared
from benchmarks.warming import warm, warm_in_processes


def test_the_parts_run_every_implementation_once():
    ran = []

    def counting(name):
        return lambda i: Prepared(lambda: ran.append(name))

    def fails(i):
        raise RuntimeError("does not compile")

    def unbuildable(device, seed):
        raise MemoryError

    problems = [
        double("a", ours=lambda x: ran.append("a"), peers={"bad": fails, "p": counting("a peer")}),
        double("b", build=unbuildable),
        double("c", ours=lambda x: ran.append("c")),
    ]
    for part in range(2):
        warm(problems, torch.device("cpu"), part, 2)
    assert sorted(ran) == ["a", "a peer", "c"]


SCRIPT = """
import sys, time
part, parts = sys.argv[-1].split("/")
assert sys.argv[-2] == "--warm" and parts == "3"
if part == "1":
    sys.exit(1)
if part == "2":
    time.sleep(60)
"""


def test_processes_end_in_time():
    said = warm_in_processes([sys.executable, "-c", SCRIPT], 3, 6.0)
    assert said.endswith("1 of 3 processes came to their end")
