"""Block scales and minimums fitted to the Hessian once codes and sub-scales are fixed.

A row is then linear in its ``d`` and minimums: each multiplies what its block holds (levels times
sub-scales, or sub-minimums). The output error is quadratic in them, and its least squares solution
is rounded to float16 one number after the other, as :mod:`llmopt.quantization.refinement` does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.refinement import round_solution

_ELEMENTS = 1 << 24  # of the largest intermediate: rows are taken in chunks


def refit_scales(tensor: GGMLTensor, weight: Tensor, hessian: Tensor) -> GGMLTensor:
    """Lower ``tr((W-Q) H (W-Q)^T)`` by other float16 scales and minimums; all else stays.

    Args:
        tensor: the quantized weight.
        weight: ``(out, in)``, what it stands for.
        hessian: ``(in, in) float32``, any multiple of ``sum x x^T``.

    Returns:
        a tensor no row of which is worse; rows that would not gain keep what they have.
    """
    rows, columns = tensor.shape
    unknowns = tensor.scales.shape[1] * (1 if tensor.mins is None else 2)
    chunk = max(1, _ELEMENTS // max(columns, unknowns * unknowns))
    parts = [
        _refit_rows(
            tensor.take_rows(slice(start, start + chunk)),
            weight[start : start + chunk].float(),
            hessian,
        )
        for start in range(0, rows, chunk)
    ]
    mins = None if tensor.mins is None else torch.cat([mins for _, mins in parts])
    return replace(tensor, scales=torch.cat([scales for scales, _ in parts]), mins=mins)


def _refit_rows(tensor: GGMLTensor, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of some rows, each ``(rows, blocks) float16``."""
    directions = _directions(tensor)
    stored = tensor.scales if tensor.mins is None else torch.cat([tensor.scales, tensor.mins], 1)
    num_rows, num_blocks = tensor.scales.shape
    width = tensor.type.block_size

    def by_block(values: Tensor) -> Tensor:
        return values.view(num_rows, num_blocks, width).sum(dim=2)

    normal = weight.new_empty(num_rows, stored.shape[1], stored.shape[1])
    for index in range(stored.shape[1]):
        kind, block = divmod(index, num_blocks)
        columns = slice(block * width, (block + 1) * width)
        product = directions[kind][:, columns] @ hessian[columns]  # (rows, in)
        for other, direction in enumerate(directions):
            unknowns = slice(other * num_blocks, (other + 1) * num_blocks)
            normal[:, index, unknowns] = by_block(product * direction)
    # Of the change alone: the difference from good scales is small, and keeps its bits.
    pull = (weight - tensor.dequantize()) @ hessian
    right = torch.cat([by_block(pull * direction) for direction in directions], dim=1)
    found, gain = round_solution(stored.float(), normal, right, stored)
    found = torch.where((gain > 0).unsqueeze(1), found, stored)
    return found[:, :num_blocks], found[:, num_blocks:]


def _directions(tensor: GGMLTensor) -> list[Tensor]:
    """What each block's scale multiplies, and what its minimum does: ``(rows, in) float32``."""
    units = torch.ones_like(tensor.scales)
    whole = tensor.sub_scales
    levels = replace(tensor, scales=units, sub_scales=whole, mins=None, sub_mins=None).dequantize()
    if tensor.mins is None:
        return [levels]
    shifts = replace(tensor, mins=units).shifts()
    assert shifts is not None
    return [levels, shifts.repeat_interleave(tensor.type.sub_block, dim=1)]
