"""The operations as the package offers them."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import llmopt_kernels

WITHOUT_TRITON = """
import os, sys, torch
sys.modules["triton"] = None
os.environ["TRITON_INTERPRET"] = "1"
import llmopt_kernels
from llmopt_kernels.rope import launch_rope
x, table = torch.ones(2, 3, 64), torch.zeros(5, 32)
given = (x, torch.zeros(2, dtype=torch.int32), table, table)
print(float(llmopt_kernels.rope(*given).sum()))
try:
    launch_rope(*given)
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize("name", llmopt_kernels.__all__)
def test_an_operation_is_a_function_with_a_reference_and_a_launcher(name: str) -> None:
    operation = getattr(llmopt_kernels, name)
    assert isinstance(operation, types.FunctionType) and operation.__doc__
    module = importlib.import_module(operation.__module__)
    own = name.removesuffix("_paged")  # attention_prefill has two doors
    assert operation.__module__ == f"llmopt_kernels.{own}"
    assert any(part == f"{own}_reference" for part in vars(module))
    assert any(part == f"launch_{own}" for part in vars(module))


def test_without_triton_the_references_serve_and_a_launch_says_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=Path(llmopt_kernels.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["0.0", "this kernel needs triton: pip install triton"]


def test_every_operation_is_compiled_ahead_of_time_and_benchmarked() -> None:
    kernels = Path(llmopt_kernels.__file__).parents[1]
    for folder in ("aot/cases", "benchmarks/suite"):
        there = {file.stem for file in (kernels / folder).glob("[!_]*.py")}
        owed = {getattr(llmopt_kernels, name).__module__ for name in llmopt_kernels.__all__}
        assert {name.rpartition(".")[2] for name in owed} == there
