"""Kernels run in triton's interpreter on a CPU, on the device itself where there is a GPU."""

from __future__ import annotations

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
