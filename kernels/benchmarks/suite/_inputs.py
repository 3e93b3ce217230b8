"""Random inputs, drawn on the device."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from llmopt_kernels.launching import architecture


class Draw:
    """Draws from one seed, in turn."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
    ) -> Tensor:
        """Normal with deviation ``scale``."""
        wide = torch.randn(shape, generator=self._generator, device=self.device)
        return wide.mul_(scale).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Float32 from ``low`` to ``high``."""
        wide = torch.rand(shape, generator=self._generator, device=self.device)
        return wide.mul_(high - low).add_(low)

    def integers(self, *shape: int, high: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """From 0 to ``high - 1``."""
        generator, device = self._generator, self.device
        return torch.randint(0, high, shape, generator=generator, device=device, dtype=dtype)

    def permutation(self, count: int) -> Tensor:
        """Of ``0 .. count - 1``, int32."""
        return torch.randperm(count, generator=self._generator, device=self.device).int()


def chip_here() -> int | str:
    """The ``architecture`` of the GPU here; of an H200 where there is none."""
    return architecture(torch.device("cuda")) if torch.cuda.is_available() else 90


Inputs = SimpleNamespace
"""Named tensors, as a suite's ``build`` makes them."""
