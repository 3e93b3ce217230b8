"""Codes tried on sub-blocks, and the error of any scale and shift with these codes.

With codes held, the weighted squared error of a sub-block is quadratic in its step ``a`` and its
shift ``t`` (a weight is ``a * level + t``)::

    sum h (x - a l - t)^2 = R - 2 a P + a^2 A  (- 2 t Q + 2 a t B + t^2 C)
    A = sum h l^2, P = sum h l x, B = sum h l, C = sum h, Q = sum h x, R = sum h x^2

so once the six sums are known, steps and shifts are compared without touching the weights again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantization.ggml.columns import codebook_table, nearest_entry, ratio, reciprocal
from llmopt.quantization.ggml.types import GGMLType

# A determinant below this part of its product is rounding noise: the codes are all alike.
_SINGULAR = 3e-6

_COARSE_BITS = 6


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over sub-blocks with some codes, all ``(sub_blocks, blocks) float32``.

    Attributes:
        level_2: ``A``.
        level_x: ``P``.
        level: ``B``, ``None`` in types without minimum.
    """

    level_2: Tensor
    level_x: Tensor
    level: Tensor | None = None

    def where(self, chosen: Tensor, other: Moments) -> Moments:
        """These where ``chosen``, elsewhere ``other``'s."""
        level = None
        if self.level is not None and other.level is not None:
            level = torch.where(chosen, self.level, other.level)
        return Moments(
            torch.where(chosen, self.level_2, other.level_2),
            torch.where(chosen, self.level_x, other.level_x),
            level,
        )


class Trial:
    """Some blocks with their weighting, and the buffers to try codes on them.

    Args:
        x: ``(sub_block, sub_blocks, blocks) float32``.
        weights: ``h``, like ``x``.
        kind: a block type.
    """

    def __init__(self, x: Tensor, weights: Tensor, kind: GGMLType) -> None:
        self.x, self.weights, self.kind = x, weights, kind
        self._levels, self._product = torch.empty_like(x), torch.empty_like(x)
        self._weighted = weights * x
        self.sum_weights = weights.sum(0)
        self.sum_x = self._weighted.sum(0)
        self.energy = torch.mul(self._weighted, x, out=self._product).sum(0)
        self._tried = self._levels
        # So small an error is lost in the rounding of sums that are so much larger.
        self._is_fine = kind.bits > _COARSE_BITS
        self._table = self._values = None
        if kind.codebook is not None:
            self._table = codebook_table(kind, x.device)
            self._values = kind.levels(x.device)[self._table.int()]
        else:
            self._lowest, self._highest = -kind.offset, kind.max_code - kind.offset

    def moments(self, steps: Tensor, shifts: Tensor | None) -> Moments:
        """Try the codes that are nearest on a grid ``(sub_blocks, blocks)``."""
        levels = self._tried = self._encode(reciprocal(steps), shifts)
        product = self._product
        level_x = torch.mul(self._weighted, levels, out=product).sum(0)
        torch.mul(self.weights, levels, out=product)
        level = None if shifts is None else product.sum(0)
        return Moments(product.mul_(levels).sum(0), level_x, level)

    def codes(self, steps: Tensor, shifts: Tensor | None) -> Tensor:
        """The nearest codes themselves, in a buffer of the trial's."""
        inverse = reciprocal(steps)
        if self._table is None:
            return self._encode(inverse, shifts).add_(self.kind.offset)
        torch.mul(self.x, inverse, out=self._levels)
        return nearest_entry(self._levels, self._product, self._table)

    def _encode(self, inverse: Tensor, shifts: Tensor | None) -> Tensor:
        levels = self._levels
        if self._values is not None:
            torch.mul(self.x, inverse, out=levels)
            return nearest_entry(levels, self._product, self._values)
        if shifts is None:
            torch.mul(self.x, inverse, out=levels)
        else:
            torch.sub(self.x, shifts, out=levels).mul_(inverse)
        return levels.round_().clamp_(self._lowest, self._highest)

    def error(self, moments: Moments, steps: Tensor, shifts: Tensor | None) -> Tensor:
        """The error of the codes tried last on another grid, ``(sub_blocks, blocks)``."""
        if self._is_fine:
            product = torch.mul(self._tried, steps, out=self._product).sub_(self.x)
            return product.square_().mul_(self.weights).sum(0)
        error = self.energy + steps * (steps * moments.level_2 - 2 * moments.level_x)
        if shifts is not None:
            assert moments.level is not None
            slope = 2 * (steps * moments.level - self.sum_x) + shifts * self.sum_weights
            error += shifts * slope
        return error

    def best_shifts(self, moments: Moments, steps: Tensor) -> Tensor:
        """The shift of least error for given steps."""
        assert moments.level is not None
        return ratio(self.sum_x - steps * moments.level, self.sum_weights)

    def best_grid(self, moments: Moments, *, shift_limit: float) -> tuple[Tensor, Tensor]:
        """Step and shift of least error with these codes; shifts not above ``shift_limit``."""
        assert moments.level is not None
        a, b, c = moments.level_2, moments.level, self.sum_weights
        product = a * c
        determinant = product - b * b
        sound = determinant > _SINGULAR * product
        safe = torch.where(sound, determinant, 1.0)
        steps = (c * moments.level_x - b * self.sum_x) / safe
        shifts = (a * self.sum_x - b * moments.level_x) / safe
        sound &= (steps > 0) & (shifts <= shift_limit)
        steps = torch.where(sound, steps, ratio(moments.level_x, a).clamp_(min=0))
        flat = torch.where(a > 0, 0.0, ratio(self.sum_x, c).clamp_(max=shift_limit))
        return steps, torch.where(sound, shifts, flat)
