"""GPTQ (Frantar et al., arXiv 2210.17323), in the form that needs no inverse.

With ``H = (I + U) D (I + U)^T``, ``U`` strictly upper triangular, column ``k`` is rounded from
``w_k + sum over i < k of (w_i - q_i) U_ik`` (Chee et al., arXiv 2307.13304, prove it equal to
GPTQ). One Cholesky factorisation gives ``U``; the usual form takes two and an inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.grid import Clip, Grid, group_moments, make_grid
from llmopt.quantization.hessian import (
    check_hessian,
    conditional_feedback,
    energy_order,
    factorize,
)
from llmopt.quantization.output_error import relative_output_error, sampled_rows, take_rows
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.refinement import refine_scales
from llmopt.quantization.rtn import check_matrix, rtn
from llmopt.quantization.scheme import Scheme
from llmopt_kernels.gptq_columns import columns_per_call, gptq_columns

Quantized = TypeVar("Quantized", QuantizedTensor, GGMLTensor)

_BLOCK_COLUMNS = 256  # columns between two products with the errors of all columns before


@dataclass(frozen=True, slots=True)
class GPTQOptions:
    """How to solve.

    Attributes:
        damping: fraction of the mean Hessian diagonal added to the diagonal.
        static_groups: scales of all groups from the unmodified weight; otherwise from the weight
            as updated when the group's first column is reached.
        clip: see :func:`llmopt.quantization.grid.make_grid`.
        refine_scales: fit the group scales once more when all codes are known
            (:mod:`llmopt.quantization.refinement`).
    """

    damping: float = 0.01
    static_groups: bool = True
    clip: Clip = "none"
    refine_scales: bool = False


@dataclass(frozen=True, slots=True)
class GPTQResult(Generic[Quantized]):
    """What was found, and what the report says about it.

    Attributes:
        tensor: the quantized weight, of integers or of ggml's blocks.
        damping: the damping fraction that was needed.
        num_factorizations: factorisations tried, 1 if the first succeeded.
        num_dead_columns: columns whose input was always zero; they got plain rounding.
        error: ``tr((W-Q) H (W-Q)^T) / tr(W H W^T)`` with the undamped Hessian (0 where the
            denominator is), measured on at most 256 evenly spaced rows.
        rtn_error: the same for plain rounding on the grid that was given (the same clipping, groups
            where they lie; the scales that a search of blocks found).
    """

    tensor: Quantized
    damping: float
    num_factorizations: int
    num_dead_columns: int
    error: float
    rtn_error: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    options: GPTQOptions,
    scale_dtype: torch.dtype,
) -> GPTQResult[QuantizedTensor]:
    """Quantize ``weight (out, in)`` against ``hessian (in, in)``, any multiple of ``sum x x^T``.

    Neither is changed. Computed in float32 on the weight's device.

    Raises:
        BadInputError: if shapes, scheme and options do not fit together.
        NumericalError: on NaN or infinity, a scale that ``scale_dtype`` cannot hold, or a Hessian
            that no damping up to 1.0 makes positive definite.
    """
    _check(weight, hessian, scheme, options)
    hessian = hessian.to(weight.device, torch.float32)
    check_hessian(hessian)
    order = None if scheme.activation_order == "none" else energy_order(hessian)
    factor = factorize(hessian, order, options.damping)
    solver = _Solver(weight, hessian, order, scheme, options, scale_dtype)
    solver.solve(factor.feedback)
    tensor = solver.result()
    if options.refine_scales:
        tensor = refine_scales(tensor, weight, hessian)
    error, rtn_error = _errors(weight, hessian, tensor, options.clip)
    return GPTQResult(
        tensor=tensor,
        damping=factor.damping,
        num_factorizations=factor.num_factorizations,
        num_dead_columns=int((hessian.diagonal() == 0).sum()),
        error=error,
        rtn_error=rtn_error,
    )


def _check(weight: Tensor, hessian: Tensor, scheme: Scheme, options: GPTQOptions) -> None:
    check_matrix(weight)
    columns = weight.shape[1]
    scheme.columns_per_group(columns)
    if tuple(hessian.shape) != (columns, columns):
        raise BadInputError(
            f"a Hessian of shape {tuple(hessian.shape)} for a weight of {columns} input features",
            f"give a square Hessian of {columns} rows",
        )
    if scheme.activation_order == "weight" and not options.static_groups:
        raise BadInputError(
            "activation_order: weight visits the columns of a group far apart, so its scale "
            "cannot wait for the first of them",
            "set static_groups: true, or activation_order: none",
        )
    if not 0.0 <= options.damping <= 1.0:
        raise BadInputError(
            f"damping {options.damping} is not a fraction of the mean Hessian diagonal",
            "use a number from 0 to 1, for example 0.01",
        )


class _Solver:
    """The column loop and its buffers; all are ``(in, out)``, so that a column is contiguous."""

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor,
        order: Tensor | None,
        scheme: Scheme,
        options: GPTQOptions,
        scale_dtype: torch.dtype,
    ) -> None:
        rows, columns = weight.shape
        self.scheme, self.options, self.order = scheme, options, order
        self.scale_dtype = scale_dtype
        self.group_columns = scheme.columns_per_group(columns)
        self.num_groups = columns // self.group_columns
        taken = weight.t() if order is None else weight.t()[order]
        # Weights at first; once rounded, a column is overwritten by what it feeds back: its error,
        # or with dynamic groups its residual (see conditional_feedback).
        self.errors = torch.empty((columns, rows), dtype=torch.float32, device=weight.device)
        self.errors.copy_(taken)
        self.codes = torch.empty((columns, rows), dtype=torch.uint8, device=weight.device)
        groups = torch.arange(columns, device=weight.device) // self.group_columns
        if order is not None and scheme.activation_order == "weight":
            groups = order // self.group_columns
        self.groups = groups
        self.stored_scales = weight.new_empty((self.num_groups, rows), dtype=scale_dtype)
        self.scales = torch.empty_like(self.stored_scales, dtype=torch.float32)
        self.zero_points = torch.full_like(self.scales, scheme.midpoint)
        self.moments: Tensor | None = None
        if options.clip == "activation":
            dealt = order if scheme.activation_order == "group" else None
            self.moments = group_moments(hessian, self.group_columns, dealt)
        # One group a row is complete before the first column, whatever was asked for.
        self.dynamic = not options.static_groups and self.num_groups > 1
        if not self.dynamic:
            source = (
                weight
                if order is None or scheme.activation_order == "weight"
                else (self.errors.t())
            )
            values = source.reshape(rows, self.num_groups, self.group_columns)
            grid = make_grid(values, scheme, scale_dtype, options.clip, self.moments)
            self._store(slice(None), grid)

    def _store(self, group: slice, grid: Grid) -> None:
        self.stored_scales[group] = grid.scales.t()
        self.scales[group] = grid.scales.t().float()
        if grid.zero_points is not None:
            self.zero_points[group] = grid.zero_points.t().float()

    def solve(self, feedback: Tensor) -> None:
        """Round every column, block by block, given :class:`Factor`'s feedback."""
        if self.dynamic:
            feedback = conditional_feedback(feedback)
        columns, rows = self.errors.shape
        block_columns = _BLOCK_COLUMNS
        if self.dynamic:  # a group must not straddle two blocks
            block_columns = max(_BLOCK_COLUMNS // self.group_columns, 1) * self.group_columns
        scratch = self.errors.new_empty((min(block_columns, columns), rows))
        for start in range(0, columns, block_columns):
            stop = min(start + block_columns, columns)
            adjusted = scratch[: stop - start]
            if start:
                torch.addmm(
                    self.errors[start:stop],
                    feedback[start:stop, :start],
                    self.errors[:start],
                    out=adjusted,
                )
            else:
                adjusted.copy_(self.errors[start:stop])
            self._solve_block(adjusted, feedback, start, stop)

    def _solve_block(self, adjusted: Tensor, feedback: Tensor, start: int, stop: int) -> None:
        group_columns = self.group_columns if self.dynamic else stop
        for first, last in _steps(start, stop, columns_per_call(adjusted), group_columns):
            if self.dynamic and first % self.group_columns == 0:
                group = first // self.group_columns
                values = adjusted[first - start : first - start + self.group_columns]
                grid = make_grid(
                    values.t().unsqueeze(1),
                    self.scheme,
                    self.scale_dtype,
                    self.options.clip,
                    None if self.moments is None else self.moments[group : group + 1],
                )
                self._store(slice(group, group + 1), grid)
            gptq_columns(
                adjusted[first - start : last - start],
                feedback[first:last, first:last],
                self.scales,
                self.zero_points,
                self.groups[first:last],
                self.errors[first:last],
                self.codes[first:last],
                max_code=self.scheme.max_code,
                residuals=self.dynamic,
            )
            if last < stop:
                adjusted[last - start :].addmm_(
                    feedback[last:stop, first:last], self.errors[first:last]
                )

    def result(self) -> QuantizedTensor:
        """The solved columns, back where the weight has them."""
        codes, group_index = self.codes, None
        if self.order is not None:
            back = torch.argsort(self.order)
            codes = codes[back]
            if self.scheme.activation_order == "group":
                group_index = (back // self.group_columns).to(torch.int32)
        # A plain contiguous() would leave odd strides where there is one group.
        layout = torch.contiguous_format
        zero_points = self.zero_points.t().to(torch.uint8).clone(memory_format=layout)
        return QuantizedTensor(
            codes=codes.t().contiguous(),
            scales=self.stored_scales.t().clone(memory_format=layout),
            zero_points=None if self.scheme.symmetric else zero_points,
            group_index=group_index,
            scheme=self.scheme,
        )


def _steps(
    start: int, stop: int, step_columns: int, group_columns: int
) -> Iterator[tuple[int, int]]:
    """Cut ``start..stop`` into steps that do not straddle groups."""
    while start < stop:
        group_end = (start // group_columns + 1) * group_columns
        last = min(start + step_columns, group_end, stop)
        yield start, last
        start = last


def _errors(
    weight: Tensor, hessian: Tensor, tensor: QuantizedTensor, clip: Clip
) -> tuple[float, float]:
    rows = sampled_rows(weight)
    some = weight[rows].float()
    found = take_rows(tensor, rows)
    # Rows are rounded independently of each other, so rounding these alone is the same.
    plain = rtn(
        some,
        replace(tensor.scheme, activation_order="none"),
        clip=clip,
        scale_dtype=tensor.scales.dtype,
        hessian=hessian,
    )
    return (
        relative_output_error(some, found.dequantize(), hessian),
        relative_output_error(some, plain.dequantize(), hessian),
    )
