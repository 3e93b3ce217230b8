"""A lazily read bag of named tensors: what every reader of weights is to the rest of llmopt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    file: Path

    @property
    def num_parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorSource(Protocol):
    """Named tensors, each read when asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in file order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor; ``KeyError`` if there is none of that name."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, memory-mapped where the source allows; not to be written to."""
        ...
