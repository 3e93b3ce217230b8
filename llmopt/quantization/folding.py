"""Scales that can be folded without changing the model: what is stored in 16 bit decides.

A producer's channel is divided by ``s``, the matching columns of its readers are multiplied by it.
What is quantized afterwards takes any ``s``; what stays in the source's element type must hold the
result exactly, or the folded model is another one before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredValues:
    """A tensor that the channels reach and that is not quantized.

    Attributes:
        values: ``(channels, n)`` in the element type it is stored in: what channel ``c`` scales.
        divided: divided by the scales (a producer's) or multiplied by them (a reader's).
        offset: what the module adds before it multiplies: Gemma's norms hold ``w`` and use
            ``1 + w``.
    """

    values: Tensor
    divided: bool = True
    offset: float = 0.0

    def scaled(self, scales: Tensor) -> Tensor:
        """What is stored once ``scales (channels,) float32`` are folded in: as ``values``."""
        factors = (1 / scales if self.divided else scales).unsqueeze(1)
        found = (self._effective(self.values) * factors - self.offset).to(self.values.dtype)
        # An offset swallows the last bits of a small value, so what is not scaled is not computed.
        return torch.where(factors == 1, self.values, found)

    def folded_scales(self, scales: Tensor) -> Tensor:
        """The scales that this tensor, rounded to its element type, has in fact been divided by.

        For one value a channel. Where a value would leave its range the scale is 1, and
        :meth:`scaled` leaves the value alone; zero takes any scale.
        """
        assert self.divided and self.values.shape[1] == 1
        before = self._effective(self.values)
        found = (before / self._effective(self.scaled(scales))).squeeze(1)
        # A rounded value is off by a few parts in a thousand, except near the ends of the range.
        sound = found.isfinite() & (found > 0.5 * scales) & (found < 2 * scales)
        return torch.where(before.squeeze(1) == 0, scales, torch.where(sound, found, 1.0))

    def is_exact(self, scales: Tensor) -> Tensor:
        """``(channels,) bool``: whether the element type holds every scaled value exactly."""
        factors = (1 / scales if self.divided else scales).unsqueeze(1)
        wanted = self._effective(self.values) * factors
        found = self._effective(self.scaled(scales))
        return ((found == wanted) & found.isfinite()).all(dim=1)

    def _effective(self, values: Tensor) -> Tensor:
        return values.float() + self.offset if self.offset else values.float()


def exact_scales(scales: Tensor, stored: Sequence[StoredValues]) -> Tensor:
    """The scales nearest to ``scales (channels,) float32`` that fold exactly into ``stored``.

    Nothing stored: any scale. One value a channel: it is rounded first, and the scale taken back
    from it. More: powers of two, and 1 where even that is not exact.
    """
    if not stored:
        return scales
    if len(stored) == 1 and stored[0].divided and stored[0].values.shape[1] == 1:
        return stored[0].folded_scales(scales)
    powers = torch.exp2(torch.round(torch.log2(scales)))
    for tensor in stored:
        powers = torch.where(tensor.is_exact(powers), powers, 1.0)
    return powers
