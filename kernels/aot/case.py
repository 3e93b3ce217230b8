"""A launch to compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a launcher on meta tensors.

    Attributes:
        name: operation, head dimension, element type and what else tells it apart.
        launch: calls the launcher; takes no arguments.
        tensor_cores: whether its product must run on them.
        shipped: whether this is what the launcher chooses; the others are tuning candidates,
            compiled by ``make kernels-aot-full`` alone.
        archs: compute capabilities that it is for; fp8 needs 90.
    """

    name: str
    launch: Callable[[], object]
    tensor_cores: bool
    shipped: bool = True
    archs: tuple[int, ...] = (80, 90)

    def runs_on(self, capability: int | str) -> bool:
        """Whether a chip can run it; AMD's has another fp8, so it runs what an 80 can."""
        return (capability if isinstance(capability, int) else 80) in self.archs


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without storage; its strides are those of a contiguous one."""
    return torch.empty(shape, dtype=dtype, device="meta")
