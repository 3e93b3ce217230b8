"""llama.cpp's own quantization, ``quantize_row_*_ref`` and ``quantize_*_impl`` of ggml-quants.c.

For comparison, for files that must equal those of llama.cpp's tools, and as a starting point that
ours must not fall behind. Types differ in how values are weighted, in which search finds the scales
of sub-blocks and in how those scales are rounded to whole numbers in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.quantization.ggml.columns import (
    Found,
    codebook_table,
    nearest_entry,
    quotient,
    ratio,
    reciprocal,
    signed_peak,
    through_float16,
)
from llmopt.quantization.ggml.compatible_fits import (
    fit_affine,
    fit_by_coordinates,
    fit_codebook,
    fit_positive,
    fit_symmetric,
    ordered_sum,
)
from llmopt.quantization.ggml.types import GGMLType

_EMPTY = 1e-15


_COLUMNS = 64  # squared at a time


def row_energies(weight: Tensor) -> Tensor:
    """The sum of squares of each row of ``weight (out, in)``, left to right: ``(out,) float32``."""
    total = torch.zeros(len(weight), device=weight.device)
    for start in range(0, weight.shape[1], _COLUMNS):
        columns = weight[:, start : start + _COLUMNS].t().float().contiguous()
        for column in columns.square_():
            total += column
    return total


def compatible(
    x: Tensor, kind: GGMLType, importance: Tensor | None, energies: Tensor | None
) -> Found:
    """Quantize blocks as llama.cpp does.

    Args:
        x: ``(sub_block, sub_blocks, blocks) float32``, the blocks of whole rows.
        kind: a block type, and not what :func:`llmopt.quantization.ggml.nearest.nearest` does.
        importance: of each value, like ``x``, or ``None``.
        energies: ``(rows,)``, what ``row_energies`` says of the rows that the blocks make up; asked
            for where blocks are neither cut nor by codebook.
    """
    if kind.codebook is not None:
        return _by_codebook(x, kind, importance)
    if kind.sub_scale_limits is None:
        assert importance is not None and energies is not None
        return _uncut_with_importance(x, kind, importance, energies)
    if kind.min_sign:
        return _cut_with_minimum(x, kind, importance)
    return _cut_without_minimum(x, kind, importance)


def _uncut_with_importance(
    x: Tensor, kind: GGMLType, importance: Tensor, energies: Tensor
) -> Found:
    blocks = x.shape[2] // len(energies)
    means = quotient(energies, blocks * kind.block_size)
    weights = _weigh(x, importance, means.repeat_interleave(blocks))
    if not kind.min_sign:
        scales, codes = fit_symmetric(x, weights, kind.offset)
        return Found(codes, scales.squeeze(0))
    scales, minimums, codes = _affine_with_importance(x, weights, kind)
    return Found(codes, scales.squeeze(0), mins=-minimums.squeeze(0))


def _mean_square(x: Tensor) -> Tensor:
    """Of each block, ``(blocks,)``."""
    in_order = (x * x).transpose(0, 1).flatten(0, 1)
    return ordered_sum(in_order) / len(in_order)


def _weigh(x: Tensor, importance: Tensor, energy: Tensor) -> Tensor:
    """Large values count for more than their importance alone says."""
    return _square_root((x * x).add_(energy)).mul_(importance)


def _square_root(values: Tensor) -> Tensor:
    """Correctly rounded; torch's own in single precision is off by a bit where MKL computes it."""
    return values.double().sqrt_().float()


def _affine_with_importance(
    x: Tensor, weights: Tensor, kind: GGMLType
) -> tuple[Tensor, Tensor, Tensor]:
    return fit_affine(x, weights, kind.max_code, first=-0.9, step=0.05, num_steps=36)


def _cut_with_minimum(x: Tensor, kind: GGMLType, importance: Tensor | None) -> Found:
    assert kind.sub_scale_limits is not None
    peak = kind.sub_scale_limits[1]
    if importance is not None:
        energy = _mean_square(x) * (1 if kind.name == "Q2_K" else 2)
        weights = _weigh(x, importance, energy)
        scales, minimums, codes = _affine_with_importance(x, weights, kind)
        of_sub_blocks = ordered_sum(weights)
        scale, sub_scales = fit_positive(scales, of_sub_blocks, peak)
        minimum, sub_mins = fit_positive(minimums, of_sub_blocks, peak)
    else:
        scales, minimums, codes = _affine_without_importance(x, kind)
        scale, sub_scales = _by_largest(scales, peak)
        minimum, sub_mins = _by_largest(minimums, peak)
    scale, minimum = through_float16(scale), through_float16(minimum)
    _encode_again(x, codes, scale * sub_scales, kind, minimum * sub_mins)
    return Found(codes, scale, sub_scales, minimum, sub_mins)


def _affine_without_importance(x: Tensor, kind: GGMLType) -> tuple[Tensor, Tensor, Tensor]:
    if kind.name == "Q2_K":
        return fit_affine(
            x, x.abs(), kind.max_code, first=-0.5, step=0.1, num_steps=15, absolute=True
        )
    weights = x.abs() + _square_root(ordered_sum(x * x) / len(x))
    first, num_steps = (-1.0, 20) if kind.name == "Q4_K" else (-0.5, 15)
    return fit_affine(x, weights, kind.max_code, first=first, step=0.1, num_steps=num_steps)


def _by_largest(values: Tensor, peak: int) -> tuple[Tensor, Tensor]:
    """``values (sub_blocks, blocks)``, not negative, in whole parts of the largest."""
    largest = values.amax(0).clamp_(min=0)
    inverse = ratio(torch.full_like(largest, peak), largest)
    # Plus zero, so that the sum of none is not minus zero.
    return quotient(largest, peak) + 0.0, (values * inverse).round_().clamp_(0, peak)


def _cut_without_minimum(x: Tensor, kind: GGMLType, importance: Tensor | None) -> Found:
    if kind.name == "Q3_K" and importance is None:
        scales, codes = fit_by_coordinates(x, kind.offset)
        scale, sub_scales = _by_signed_largest(scales, kind)
    elif kind.name == "Q3_K":
        assert importance is not None
        weights = _weigh(x, importance, _mean_square(x) * 2)
        scales, codes = fit_symmetric(x, weights, kind.offset)
        scale, sub_scales = fit_symmetric(scales, ordered_sum(weights), 32)
        sub_scales -= 32
    else:
        weights = x * x if importance is None else importance
        scales, codes = fit_symmetric(x, weights, kind.offset)
        scale, sub_scales = _by_signed_largest(scales, kind)
        codes *= scales.abs().amax(0) >= _EMPTY
    scale = through_float16(scale)
    _encode_again(x, codes, scale * sub_scales, kind)
    return Found(codes, scale, sub_scales)


def _by_signed_largest(scales: Tensor, kind: GGMLType) -> tuple[Tensor, Tensor]:
    """The largest scale becomes the lowest whole number, the only one of its magnitude."""
    assert kind.sub_scale_limits is not None
    lowest, highest = kind.sub_scale_limits
    largest = signed_peak(scales)
    # The two types differ in what counts as nothing, and in what is stored then.
    empty = largest.abs() < _EMPTY if kind.name == "Q6_K" else largest == 0
    inverse = quotient(lowest, torch.where(empty, 1.0, largest))
    sub_scales = (scales * inverse).round_().clamp_(lowest, highest)
    sub_scales.masked_fill_(empty, 0.0 if kind.name == "Q6_K" else lowest)
    return torch.where(empty, 0.0, 1 / inverse), sub_scales


def _encode_again(
    x: Tensor, codes: Tensor, steps: Tensor, kind: GGMLType, shifts: Tensor | None = None
) -> None:
    """Codes nearest on the stored scales; those of a sub-block without scale stay as they are."""
    nothing = steps == 0
    again = x.clone() if shifts is None else x + shifts
    again.div_(torch.where(nothing, 1.0, steps)).round_()
    again.clamp_(-kind.offset, kind.max_code - kind.offset).add_(kind.offset)
    torch.where(nothing, codes, again, out=codes)


def _by_codebook(x: Tensor, kind: GGMLType, importance: Tensor | None) -> Found:
    weights = x * x if importance is None else _weigh(x, importance, _mean_square(x) * 2)
    table = codebook_table(kind, x.device)
    scales = fit_codebook(x, weights, kind.levels(x.device), table)
    if kind.sub_scale_limits is None:
        scaled = x * reciprocal(scales)
        return Found(nearest_entry(scaled, scaled, table), scales.squeeze(0))
    lowest, highest = kind.sub_scale_limits
    scale = quotient(signed_peak(scales), lowest)
    sub_scales = (scales * reciprocal(scale)).round_().clamp_(lowest, highest)
    # By the scale before it is stored, as llama.cpp has it.
    scaled = x * reciprocal(scale * sub_scales)
    return Found(nearest_entry(scaled, scaled, table), scale, sub_scales)
