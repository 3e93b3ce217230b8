"""The operations as the package offers them."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

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


def test_a_kernel_is_not_launched_on_a_cpu_outside_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmopt_kernels.launching import check_launchable

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="call the operation itself"):
        check_launchable(x=torch.zeros(1))
    with pytest.raises(ValueError, match="x on cpu, y on meta"):
        check_launchable(x=torch.zeros(1), y=torch.zeros(1, device="meta"))


def test_fp8_needs_a_chip_that_has_it() -> None:
    from llmopt_kernels.launching import fp8_refusal

    assert fp8_refusal((8, 9)) is None and fp8_refusal((9, 0)) is None
    assert "8.0, and fp8 needs 8.9" in (fp8_refusal((8, 0)) or "")


def test_only_a_gpu_takes_the_kernel() -> None:
    from llmopt_kernels.launching import compiling, runs_kernel

    meta = torch.zeros(1, device="meta")
    assert not runs_kernel(torch.zeros(1)) and not runs_kernel(meta)
    with compiling():
        assert runs_kernel(meta)
