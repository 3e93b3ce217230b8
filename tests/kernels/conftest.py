"""Kernels run in triton's interpreter on a CPU, on the device itself where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.triton_interpreter import install

GPU = torch.cuda.is_available()

if not GPU:
    install()


@pytest.fixture
def device() -> str:
    """Where a kernel's tensors live."""
    return "cuda" if GPU else "cpu"


@pytest.fixture
def checked_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter an integer that its type does not hold raises, before it is an address."""
    if not GPU:
        from triton.runtime.interpreter import interpreter_builder as builder

        assert builder.options.sanitize_overflow
        monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
