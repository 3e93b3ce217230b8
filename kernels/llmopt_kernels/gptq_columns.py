"""GPTQ's inner loop over the columns of a block (arXiv:2210.17323; feedback form arXiv:2307.13304).

Column ``k`` of the block, one value for each row of the weight, is rounded on its own grid after
the columns before it fed back what they lost (``F`` strictly lower triangular)::

    a[k]     = adjusted[k] + sum over i < k of F[k, i] * errors[i]
    q[k]     = clamp(round(a[k] / scale), -zero_point, max_code - zero_point)
    codes[k] = q[k] + zero_point
    errors[k] = w[k] - q[k] * scale        (or, as residuals, a[k] - q[k] * scale)

Tensors are ``(columns, out)``, so that a column lies contiguous in memory.

Why one launch pays: torch needs five or six launches a column, hence 640 or more for a block of
128, and its products read all errors of the block again for every column, ``n * n * out * 4``
bytes. Here rows are independent of each other, so a program takes some rows through all columns:
it reads and writes memory ``13 * n * out`` bytes, and what it reads again (the errors of its own
rows once every ``columns_in_registers`` columns, the feedback block) comes out of cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.launching import (
    check_dtype,
    check_last_contiguous,
    check_launchable,
    check_shape,
    launch,
    runs_kernel,
)
from llmopt_kernels.rounding import round_half_even
from llmopt_kernels.triton_or_stub import tl, triton

_KERNEL_COLUMNS = 128
_LOOP_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class ColumnsProblem:
    """A block of columns to round; see ``gptq_columns`` for the attributes."""

    adjusted: Tensor
    feedback: Tensor
    scales: Tensor
    zero_points: Tensor
    groups: Tensor
    errors: Tensor
    codes: Tensor
    max_code: int
    residuals: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        parts = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: part for name, part in parts if isinstance(part, Tensor)}


def gptq_columns(
    adjusted: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    groups: Tensor,
    errors: Tensor,
    codes: Tensor,
    *,
    max_code: int,
    residuals: bool = False,
    check_values: bool = False,
) -> None:
    """Round ``n`` columns one after the other; results go to ``errors`` and ``codes``.

    Args:
        adjusted: ``(n, out) float32``, the weights with what columns before these feed back; spent
            afterwards.
        feedback: ``(n, n) float32``, row ``k`` weighs the errors of the columns before ``k``; must
            be zero from the diagonal on.
        scales: ``(groups, out) float32``.
        zero_points: ``(groups, out) float32``, whole numbers ``0..max_code``.
        groups: ``(n,) int64``, the group of each column, a row of ``scales``.
        errors: ``(n, out) float32``, finite; the weights on entry, unless ``residuals``; what the
            columns feed back on return.
        codes: ``(n, out) uint8``, written.
        max_code: the largest code, up to 255.
        residuals: feed back what rounding loses of the adjusted value, not of the weight.
        check_values: hold that ``groups`` are rows of ``scales``. Waits for the device; for
            debugging.

    Raises:
        ValueError: shape, element type, stride, device or ``max_code`` that does not fit; with
            ``check_values``, a group out of range.
    """
    problem = ColumnsProblem(
        adjusted, feedback, scales, zero_points, groups, errors, codes, max_code, residuals
    )
    check_problem(problem, check_values)
    if runs_kernel(adjusted):
        launch_gptq_columns(problem)
    else:
        gptq_columns_reference(problem)


def columns_per_call(tensor: Tensor) -> int:
    """How many columns ``gptq_columns`` is best given at once for tensors where this one is.

    A product with what earlier calls fed back stands between two calls: more columns make fewer
    products, and more work within a call that grows with their square.
    """
    return _KERNEL_COLUMNS if runs_kernel(tensor) else _LOOP_COLUMNS


def gptq_columns_reference(problem: ColumnsProblem) -> None:
    """The same in torch, in the element type of the tensors: float32 or, to compare, float64."""
    p = problem
    zero_point_of = p.zero_points[p.groups]
    centred = torch.empty_like(p.adjusted)
    # Feedback is zero where errors are still weights, so one product with all of them does; cutting
    # views to size takes longer than multiplying by zeros.
    transposed = p.errors.t()
    for column, code, weights, scale, error, low, high in zip(
        p.adjusted.unbind(),
        centred.unbind(),
        p.feedback.unbind(),
        p.scales[p.groups].unbind(),
        p.errors.unbind(),
        (-zero_point_of).unbind(),
        (p.max_code - zero_point_of).unbind(),
        strict=True,
    ):
        column.addmv_(transposed, weights)
        torch.div(column, scale, out=code).round_()
        torch.clamp(code, low, high, out=code)
        if p.residuals:
            error.copy_(column)
        error.addcmul_(code, scale, value=-1.0)
    p.codes.copy_(centred.add_(zero_point_of))


@triton.jit
def _gptq_columns_kernel(
    adjusted_ptr,
    feedback_ptr,
    scales_ptr,
    zero_points_ptr,
    groups_ptr,
    errors_ptr,
    codes_ptr,
    num_columns,
    num_rows,
    adjusted_stride,
    feedback_stride,
    scales_stride,
    zero_points_stride,
    errors_stride,
    codes_stride,
    max_code,
    RESIDUALS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Told that neighbours in `rows` are no neighbours in memory, the compiler gives a thread a row
    # with all its columns, not four rows with a part of them. Then picking column k below costs
    # nothing (k is known when compiling), no value crosses threads, and a warp still reads 128
    # contiguous bytes.
    rows = tl.max_contiguous(rows, 1)
    in_rows = rows < num_rows
    j = tl.arange(0, BLOCK_COLUMNS)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + j
        in_columns = columns < num_columns
        mask = in_columns[:, None] & in_rows[None, :]
        adjusted = tl.load(
            adjusted_ptr + columns[:, None] * adjusted_stride + rows[None, :], mask=mask, other=0.0
        )
        # float32 throughout: errors are sums of hundreds of terms that mostly cancel, and TF32's
        # ten bits would move values across the edge between two codes.
        for before in range(0, start, BLOCK_COLUMNS):
            for i in tl.static_range(BLOCK_COLUMNS):
                error_ptrs = errors_ptr + (before + i) * errors_stride + rows
                error = tl.load(error_ptrs, mask=in_rows, other=0.0)
                weights_ptrs = feedback_ptr + columns * feedback_stride + (before + i)
                weights = tl.load(weights_ptrs, mask=in_columns, other=0.0)
                adjusted += weights[:, None] * error[None, :]

        # Loaded ahead of the chain of columns, and results stored after it: no load waits behind a
        # store that it might read.
        group = tl.load(groups_ptr + columns, mask=in_columns, other=0)
        scales = tl.load(
            scales_ptr + group[:, None] * scales_stride + rows[None, :], mask=mask, other=1.0
        )
        zero_points = tl.load(
            zero_points_ptr + group[:, None] * zero_points_stride + rows[None, :],
            mask=mask,
            other=0.0,
        )
        errors_ptrs = errors_ptr + columns[:, None] * errors_stride + rows[None, :]
        errors = adjusted
        if not RESIDUALS:
            errors = tl.load(errors_ptrs, mask=mask, other=0.0)
        codes = adjusted
        for k in tl.static_range(BLOCK_COLUMNS):
            here = (j == k)[:, None]
            value = tl.sum(tl.where(here, adjusted, 0.0), 0)
            scale = tl.sum(tl.where(here, scales, 0.0), 0)
            zero_point = tl.sum(tl.where(here, zero_points, 0.0), 0)
            target = value
            if not RESIDUALS:
                target = tl.sum(tl.where(here, errors, 0.0), 0)
            # Divided as IEEE has it, as torch does: `/` may be an approximation. Clamped before
            # it is rounded, which is the same for whole limits and keeps to what can be rounded.
            code = tl.div_rn(value, scale)
            code = tl.minimum(tl.maximum(code, -zero_point), max_code - zero_point)
            code = round_half_even(code)
            error = target - code * scale
            errors = tl.where(here, error[None, :], errors)
            codes = tl.where(here, (code + zero_point)[None, :], codes)
            weights = tl.load(
                feedback_ptr + columns * feedback_stride + start + k,
                mask=(j > k) & in_columns,
                other=0.0,
            )
            fed = adjusted + weights[:, None] * error[None, :]
            adjusted = tl.where((j > k)[:, None], fed, adjusted)
        tl.store(errors_ptrs, errors, mask=mask)
        codes_ptrs = codes_ptr + columns[:, None] * codes_stride + rows[None, :]
        tl.store(codes_ptrs, codes.to(tl.uint8), mask=mask)
        tl.debug_barrier()  # other threads may read these errors in the next turn


@dataclass(frozen=True, slots=True)
class ColumnsConfig:
    """How the kernel is cut up.

    Attributes:
        block_rows: rows of the weight a program takes; 32 a warp is one a thread.
        columns_in_registers: columns a program holds at a time.
        num_warps: a program.
    """

    block_rows: int
    columns_in_registers: int
    num_warps: int


def shipped_config(num_rows: int) -> ColumnsConfig:
    """What ``launch_gptq_columns`` takes for ``num_rows`` rows of the weight.

    The chain of columns cannot be shortened, so rows are spread as thin as warps allow: a weight of
    a few thousand rows has only about one warp for each multiprocessor.
    """
    del num_rows
    return ColumnsConfig(block_rows=32, columns_in_registers=8, num_warps=1)


def candidate_configs(num_rows: int) -> list[ColumnsConfig]:
    """Configurations worth timing, the shipped one first."""
    return [
        shipped_config(num_rows),
        ColumnsConfig(32, 16, 1),
        ColumnsConfig(64, 8, 1),
        ColumnsConfig(64, 16, 2),
        ColumnsConfig(128, 16, 4),
    ]


def launch_gptq_columns(problem: ColumnsProblem, config: ColumnsConfig | None = None) -> None:
    """Round columns by the kernel, which reads ``feedback`` below the diagonal alone.

    Raises:
        ValueError: shape, element type, stride, device or ``max_code`` that does not fit.
    """
    p = problem
    check_problem(p)
    check_launchable(**p.tensors())
    num_columns, num_rows = p.adjusted.shape
    if p.adjusted.numel() == 0:
        return
    config = config or shipped_config(num_rows)
    # The kernel counts within a block in 32 bits: 64 would cost it registers that it has not.
    stride = max(tensor.stride(0) for tensor in (p.adjusted, p.feedback, p.errors, p.codes))
    if num_columns * stride >= 2**31:
        raise ValueError(f"{num_columns} columns {stride} elements apart; 2**31 is out of reach")
    launch(
        _gptq_columns_kernel,
        (triton.cdiv(num_rows, config.block_rows),),
        p.adjusted,
        p.feedback,
        p.scales,
        p.zero_points,
        p.groups,
        p.errors,
        p.codes,
        num_columns,
        num_rows,
        p.adjusted.stride(0),
        p.feedback.stride(0),
        p.scales.stride(0),
        p.zero_points.stride(0),
        p.errors.stride(0),
        p.codes.stride(0),
        p.max_code,
        RESIDUALS=p.residuals,
        BLOCK_COLUMNS=config.columns_in_registers,
        BLOCK_ROWS=config.block_rows,
        num_warps=config.num_warps,
        num_stages=1,
    )


def check_problem(problem: ColumnsProblem, check_values: bool = False) -> None:
    """Hold that a problem fits together; ``check_values`` reads groups and waits for the device.

    Raises:
        ValueError: shape, element type, stride or number that does not fit; says what it got.
    """
    p = problem
    check_shape("adjusted", p.adjusted, (None, None))
    columns, rows = p.adjusted.shape
    check_shape("feedback", p.feedback, (columns, columns))
    check_shape("scales", p.scales, (None, rows))
    check_shape("zero_points", p.zero_points, p.scales.shape)
    check_shape("groups", p.groups, (columns,))
    check_shape("errors", p.errors, (columns, rows))
    check_shape("codes", p.codes, (columns, rows))
    dtypes = {"groups": torch.int64, "codes": torch.uint8}
    for name, tensor in p.tensors().items():
        check_dtype(name, tensor, (dtypes.get(name, torch.float32),))
        check_last_contiguous(name, tensor)
    if not 1 <= p.max_code <= 255:
        raise ValueError(f"max_code is {p.max_code}; a code of 8 bits goes from 1 to 255")
    if check_values and columns:
        _check_groups(p.groups, p.scales.shape[0])


def _check_groups(groups: Tensor, num_groups: int) -> None:
    lowest, highest = int(groups.min()), int(groups.max())
    if lowest < 0 or highest >= num_groups:
        raise ValueError(
            f"groups go from {lowest} to {highest}; scales have rows 0 to {num_groups - 1}"
        )
