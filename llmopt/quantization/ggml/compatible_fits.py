"""How llama.cpp finds the scale of one sub-block, for all sub-blocks at once.

Each function takes what stands in a sub-block along dimension 0 and reproduces a function of
``ggml/src/ggml-quants.c``: the same candidates in the same order, single precision throughout,
the same rule for ties, sums in the same order. Compilers that contract ``a * b + c`` to one
rounding may choose otherwise between candidates that are equal but for rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmopt.quantization.ggml.columns import nearest_entry, quotient, ratio, signed_peak

_EMPTY = 1e-15  # below this a sub-block counts as zero
_SWEEPS = 5


def _candidate(base: float, step: float, index: int) -> float:
    """``base + step * index`` as single precision has it."""
    return float(np.float32(base) + np.float32(step) * np.float32(index))


def ordered_sum(values: Tensor) -> Tensor:
    """The sum along dimension 0, first to last."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


def fit_symmetric(x: Tensor, weights: Tensor, peak: int) -> tuple[Tensor, Tensor]:
    """``make_qx_quants``: levels ``-peak .. peak - 1``, the largest value near ``-peak``.

    Returns:
        scales without dimension 0, and codes (levels plus ``peak``) like ``x``.
    """
    largest = signed_peak(x)
    empty = largest.abs() < _EMPTY
    largest = torch.where(empty, 1.0, largest)
    levels, product, weighted = torch.empty_like(x), torch.empty_like(x), weights * x

    def encode(inverse: Tensor) -> None:
        torch.mul(x, inverse, out=levels).round_().clamp_(-peak, peak - 1)

    def sums() -> tuple[Tensor, Tensor]:
        level_x = ordered_sum(torch.mul(weighted, levels, out=product))
        return level_x, ordered_sum(torch.mul(weights, levels, out=product).mul_(levels))

    chosen = quotient(-peak, largest)
    encode(chosen)
    level_x, level_2 = sums()
    scale = ratio(level_x, level_2)
    best = scale * level_x
    for index in range(-9, 10):
        if index == 0:
            continue
        inverse = quotient(-_candidate(peak, 0.1, index), largest)
        encode(inverse)
        level_x, level_2 = sums()
        better = (level_2 > 0) & (level_x * level_x > best * level_2)
        new = ratio(level_x, level_2)
        scale = torch.where(better, new, scale)
        best = torch.where(better, new * level_x, best)
        chosen = torch.where(better, inverse, chosen)
    encode(chosen)
    levels.add_(peak).mul_(~empty)
    return scale.masked_fill_(empty, 0.0), levels


def fit_by_coordinates(x: Tensor, peak: int) -> tuple[Tensor, Tensor]:
    """``make_q3_quants``: one level after the other moved while that lowers the error.

    Weighs each value by its square.

    Returns:
        scales without dimension 0, and codes (levels plus ``peak``) like ``x``.
    """
    largest = signed_peak(x)
    empty = largest.abs() < _EMPTY
    largest = torch.where(empty, 1.0, largest)
    levels = (x * quotient(-peak, largest)).round_().clamp_(-peak, peak - 1)
    weights = x * x
    weighted = weights * x
    level_x = ordered_sum(weighted * levels)
    level_2 = ordered_sum(weights * levels * levels)
    for _ in range(_SWEEPS):
        for value, weight, product, level in zip(x, weights, weighted, levels, strict=True):
            less_x = level_x - product * level
            less_2 = level_2 - weight * level * level
            new = ratio(value * less_2, less_x).round_().clamp_(-peak, peak - 1)
            new_x = less_x + product * new
            new_2 = less_2 + weight * new * new
            better = (less_x > 0) & (new != level) & (new_2 > 0)
            better &= new_x * new_x * level_2 > level_x * level_x * new_2
            level.copy_(torch.where(better, new, level))
            level_x = torch.where(better, new_x, level_x)
            level_2 = torch.where(better, new_2, level_2)
    return ratio(level_x, level_2).masked_fill_(empty, 0.0), levels.add_(peak).mul_(~empty)


def fit_affine(
    x: Tensor,
    weights: Tensor,
    max_code: int,
    *,
    first: float,
    step: float,
    num_steps: int,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``make_qkx2_quants`` and ``make_qkx3_quants``: ``scale * code - minimum``, minimum >= 0.

    ``absolute`` compares absolute errors, though least squares finds the candidates.

    Returns:
        scales and minimums without dimension 0, and codes like ``x``.
    """
    lowest, highest = x.amin(0).clamp_(max=0), x.amax(0)
    flat = highest <= lowest
    sum_w, sum_x = ordered_sum(weights), ordered_sum(weights * x)
    codes, product, weighted = (torch.empty_like(x) for _ in range(3))

    def encode(inverse: Tensor, low: Tensor) -> None:
        torch.sub(x, low, out=codes).mul_(inverse).round_().clamp_(0, max_code)

    def error(scale: Tensor, low: Tensor) -> Tensor:
        torch.mul(codes, scale, out=product).add_(low).sub_(x)
        return ordered_sum((product.abs_() if absolute else product.square_()).mul_(weights))

    chosen, chosen_low = quotient(max_code, torch.where(flat, 1.0, highest - lowest)), lowest
    encode(chosen, lowest)
    scale, low = 1 / chosen, lowest
    best = error(scale, low)
    for index in range(num_steps + 1):
        # From the second candidate on, the range starts at the best minimum so far.
        span = highest - low
        levels = float(np.float32(_candidate(first, step, index)) + np.float32(max_code))
        inverse = quotient(levels, torch.where(span == 0, 1.0, span))
        encode(inverse, low)
        sum_l = ordered_sum(torch.mul(weights, codes, out=weighted))
        sum_l2 = ordered_sum(torch.mul(weighted, codes, out=product))
        sum_xl = ordered_sum(weighted.mul_(x))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = ratio(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_low = ratio(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        above = new_low > 0
        new_low = torch.where(above, 0.0, new_low)
        new_scale = torch.where(above, ratio(sum_xl, sum_l2), new_scale)
        new_error = error(new_scale, new_low)
        better = (determinant > 0) & (new_error < best)
        best = torch.where(better, new_error, best)
        chosen = torch.where(better, inverse, chosen)
        chosen_low = torch.where(better, low, chosen_low)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
    encode(chosen, chosen_low)
    codes.mul_(~flat)
    return (
        scale.masked_fill_(flat, 0.0),
        torch.where(flat, lowest, low).neg_(),
        codes,
    )


def fit_positive(x: Tensor, weights: Tensor, peak: int) -> tuple[Tensor, Tensor]:
    """``make_qp_quants``: whole numbers ``0 .. peak`` for values that are not negative.

    Returns:
        the scale without dimension 0, and the whole numbers like ``x``.
    """
    largest = x.amax(0).clamp_(min=0)
    empty = largest < _EMPTY
    largest = torch.where(empty, 1.0, largest)

    def encode(inverse: Tensor) -> Tensor:
        return (x * inverse).round_().clamp_(0, peak)

    chosen = quotient(peak, largest)

    def error(inverse: Tensor) -> Tensor:
        difference = x - encode(inverse) * (1 / inverse)
        return ordered_sum(weights * difference * difference)

    best = error(chosen)
    for index in range(-4, 5):
        if index == 0:
            continue
        inverse = quotient(_candidate(peak, 0.1, index), largest)
        new_error = error(inverse)
        better = new_error < best
        best = torch.where(better, new_error, best)
        chosen = torch.where(better, inverse, chosen)
    levels = encode(chosen)
    level_x = ordered_sum(weights * x * levels)
    level_2 = ordered_sum(weights * levels * levels)
    for _ in range(_SWEEPS):
        for value, weight, level in zip(x, weights, levels, strict=True):
            product = weight * value
            less_x = level_x - product * level
            less_2 = level_2 - weight * level * level
            new = ratio(value * less_2, less_x).round_().clamp_(0, peak)
            new_x = less_x + product * new
            new_2 = less_2 + weight * new * new
            better = (less_x > 0) & (less_2 > 0) & (new != level)
            better &= new_x * new_x * level_2 > level_x * level_x * new_2
            level.copy_(torch.where(better, new, level))
            level_x = torch.where(better, new_x, level_x)
            level_2 = torch.where(better, new_2, level_2)
    return ratio(level_x, level_2).masked_fill_(empty, 0.0), levels.mul_(~empty)


def fit_codebook(x: Tensor, weights: Tensor, levels: Tensor, table: Tensor) -> Tensor:
    """The scale search of ``quantize_row_iq4_nl_impl`` with seven tries to either side.

    Args:
        x: values, a sub-block along dimension 0.
        weights: like ``x``.
        levels: ``(codes,) float32``.
        table: what :func:`llmopt.quantization.ggml.columns.codebook_table` makes of them.

    Returns:
        scales without dimension 0.
    """
    largest = signed_peak(x)
    empty = largest.abs() < _EMPTY
    largest = torch.where(empty, 1.0, largest)
    level_table, lowest = levels[table.int()], float(levels[0])
    scaled, product = torch.empty_like(x), torch.empty_like(x)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        torch.mul(x, inverse, out=scaled)
        found = nearest_entry(scaled, scaled, level_table)
        torch.mul(weights, found, out=product)
        return ordered_sum(product * x), ordered_sum(product.mul_(found))

    level_x, level_2 = sums(1 / quotient(-largest, lowest))
    scale = ratio(level_x, level_2)
    best = scale * level_x
    for index in range(-7, 8):
        level_x, level_2 = sums(quotient(index + lowest, largest))
        better = (level_2 > 0) & (level_x * level_x > best * level_2)
        new = ratio(level_x, level_2)
        scale = torch.where(better, new, scale)
        best = torch.where(better, new * level_x, best)
    return scale.masked_fill_(empty, 0.0)
