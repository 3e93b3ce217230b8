"""GPTQ's error feedback into the fixed grid of a block type (arXiv 2210.17323).

All scales and minimums are found beforehand on the unmodified weight; columns are then rounded one
after the other, each taking up what those before it lost (:mod:`llmopt.quantization.gptq`). A
column's grid is the step and the shift of its sub-block and the levels of the type: minimums are no
whole steps here and IQ4's levels are uneven, so the column loop of integer schemes does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.quantization.ggml.columns import codebook_table, reciprocal
from llmopt.quantization.ggml.quantize import Search, quantize_blocks
from llmopt.quantization.ggml.refit import refit_scales
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.ggml.types import GGMLType
from llmopt.quantization.gptq import GPTQResult
from llmopt.quantization.hessian import check_hessian, energy_order, factorize
from llmopt.quantization.output_error import relative_output_error, sampled_rows

_BLOCK_COLUMNS = 256  # columns between two products with the errors of all columns before
_STEP_COLUMNS = 32  # columns between two products with the errors of the block


@dataclass(frozen=True, slots=True)
class FeedbackOptions:
    """How to solve.

    Attributes:
        damping: fraction of the mean Hessian diagonal added to the diagonal.
        by_energy: take columns by decreasing activation energy instead of left to right; they are
            stored where they lie all the same.
        refit: fit scales and minimums once more when all codes are known.
        search: what finds the scales that columns are rounded on.
    """

    damping: float = 0.01
    by_energy: bool = True
    refit: bool = True
    search: Search = "least-squares"


def gptq_blocks(
    weight: Tensor,
    hessian: Tensor,
    kind: GGMLType,
    options: FeedbackOptions | None = None,
    importance: Tensor | None = None,
) -> GPTQResult[GGMLTensor]:
    """Quantize ``weight (out, in)`` against ``hessian (in, in)``, any multiple of ``sum x x^T``.

    Neither is changed. Computed in float32 on the weight's device.

    Args:
        weight: the matrix.
        hessian: of its inputs.
        kind: a block type whose blocks divide ``in``.
        options: how to solve.
        importance: ``(in,)``, what the search for scales goes by; ``None`` for the Hessian's
            diagonal.

    Raises:
        BadInputError: if shapes, type and options do not fit together.
        NumericalError: on NaN or infinity, a scale that float16 cannot hold, or a Hessian that no
            damping up to 1.0 makes positive definite.
    """
    options = options or FeedbackOptions()
    _check(weight, hessian, options)
    hessian = hessian.to(weight.device, torch.float32)
    check_hessian(hessian)
    if importance is None:
        importance = hessian.diagonal().clamp(min=0)
    nearest = quantize_blocks(weight, kind, importance=importance, search=options.search)
    order = energy_order(hessian) if options.by_energy else None
    factor = factorize(hessian, order, options.damping)
    tensor = _solve(weight, nearest, factor.feedback, order)
    if options.refit:
        tensor = refit_scales(tensor, weight, hessian)
    rows = sampled_rows(weight)
    some = weight[rows].float()
    return GPTQResult(
        tensor=tensor,
        damping=factor.damping,
        num_factorizations=factor.num_factorizations,
        num_dead_columns=int((hessian.diagonal() == 0).sum()),
        error=relative_output_error(some, tensor.take_rows(rows).dequantize(), hessian),
        rtn_error=relative_output_error(some, nearest.take_rows(rows).dequantize(), hessian),
    )


def _check(weight: Tensor, hessian: Tensor, options: FeedbackOptions) -> None:
    columns = weight.shape[-1]
    if tuple(hessian.shape) != (columns, columns):
        raise BadInputError(
            f"a Hessian of shape {tuple(hessian.shape)} for a weight of {columns} input features",
            f"give a square Hessian of {columns} rows",
        )
    if not 0.0 <= options.damping <= 1.0:
        raise BadInputError(
            f"damping {options.damping} is not a fraction of the mean Hessian diagonal",
            "use a number from 0 to 1, for example 0.01",
        )


def _solve(weight: Tensor, grid: GGMLTensor, feedback: Tensor, order: Tensor | None) -> GGMLTensor:
    """The codes of error feedback on the grid of ``grid``, given :class:`Factor`'s feedback."""
    rows, columns = weight.shape
    order = torch.arange(columns, device=weight.device) if order is None else order
    groups = order // grid.type.sub_block
    # Buffers are (in, out), so that a column is contiguous. Weights at first; once rounded, a
    # column is overwritten by its error.
    errors = torch.empty((columns, rows), dtype=torch.float32, device=weight.device)
    errors.copy_(weight.t()[order])
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=weight.device)
    steps, shifts = grid.step_sizes().t().contiguous(), grid.shifts()
    if shifts is not None:
        shifts = shifts.t().contiguous()
    levels = _Levels(grid.type, weight.device)
    for start in range(0, columns, _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, columns)
        adjusted = errors[start:stop].clone()
        if start:
            adjusted.addmm_(feedback[start:stop, :start], errors[:start])
        for first in range(start, stop, _STEP_COLUMNS):
            last = min(first + _STEP_COLUMNS, stop)
            here = groups[first:last]
            _round_columns(
                adjusted[first - start : last - start],
                feedback[first:last, first:last],
                steps[here],
                None if shifts is None else shifts[here],
                errors[first:last],
                codes[first:last],
                levels,
            )
            if last < stop:
                adjusted[last - start :].addmm_(feedback[last:stop, first:last], errors[first:last])
    back = torch.argsort(order)
    return replace(grid, codes=codes[back].t().contiguous())


class _Levels:
    """The codes of a type, and what they are worth."""

    def __init__(self, kind: GGMLType, device: torch.device) -> None:
        self.lowest, self.highest = -kind.offset, kind.max_code - kind.offset
        self.offset = kind.offset
        self.table: Tensor | None = None
        if kind.codebook is not None:
            self.table = codebook_table(kind, device)
            self.values = kind.levels(device)

    def round(self, scaled: Tensor, codes: Tensor) -> Tensor:
        """Write the nearest ``codes`` of values in steps, and give their levels."""
        if self.table is None:
            levels = scaled.round_().clamp_(self.lowest, self.highest)
            codes.copy_(levels + self.offset)
            return levels
        place = scaled.mul_(2.0).floor_().clamp_(-256, 255).add_(256)
        codes.copy_(self.table[place.int()])
        return self.values[codes.int()]


def _round_columns(
    adjusted: Tensor,
    feedback: Tensor,
    steps: Tensor,
    shifts: Tensor | None,
    errors: Tensor,
    codes: Tensor,
    levels: _Levels,
) -> None:
    """Round some columns one after the other; ``(columns, out)`` but for ``feedback``."""
    inverse = reciprocal(steps)
    transposed = errors.t()
    # Feedback is zero where errors are still weights, so one product with all of them does.
    for k, (column, error) in enumerate(zip(adjusted.unbind(), errors.unbind(), strict=True)):
        column.addmv_(transposed, feedback[k])
        scaled = column if shifts is None else column - shifts[k]
        level = levels.round(scaled * inverse[k], codes[k])
        error.addcmul_(level, steps[k], value=-1.0)
        if shifts is not None:
            error -= shifts[k]
