"""Group scales fitted to the Hessian once the codes are fixed.

With centred codes ``Z`` a row's output error is quadratic in its group scales ``s``:
``(s - s*)^T A (s - s*)`` plus a constant, ``A_gh = z_g H_gh z_h^T``. The least squares solution
``s*`` is then rounded to the element type one scale after the other, each taking up what rounding
those before it left (Babai's nearest plane, as GPTQ does for columns).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmopt.quantization.quantized_tensor import QuantizedTensor

_ELEMENTS = 1 << 24  # of the largest intermediate: rows are taken in chunks
_RIDGE = 1e-6  # of each diagonal element: codes that only differ by sign are linearly dependent


def refine_scales(tensor: QuantizedTensor, weight: Tensor, hessian: Tensor) -> QuantizedTensor:
    """Lower ``tr((W-Q) H (W-Q)^T)`` by other group scales, row by row; the codes stay.

    Args:
        tensor: the quantized weight.
        weight: ``(out, in)``, what it stands for.
        hessian: ``(in, in) float32``, any multiple of ``sum x x^T``.

    Returns:
        The same codes with scales of the same element type. A row that would not gain, or whose
        scales would not all stay positive, keeps its own.
    """
    rows, columns = tensor.shape
    if tensor.group_index is not None:
        order = torch.argsort(tensor.group_index, stable=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    chunk = max(1, _ELEMENTS // columns)
    found = [
        _refine_rows(tensor, weight, hessian, slice(start, start + chunk))
        for start in range(0, rows, chunk)
    ]
    return replace(tensor, scales=torch.cat(found))


def _refine_rows(tensor: QuantizedTensor, weight: Tensor, hessian: Tensor, rows: slice) -> Tensor:
    """Scales of some rows, ``(rows, groups)``; columns and Hessian are in the groups' order."""
    stored = tensor.scales[rows]
    num_rows, num_groups = stored.shape
    before = stored.float()
    centred = tensor.codes[rows].float()
    if tensor.group_index is not None:
        centred = centred[:, torch.argsort(tensor.group_index, stable=True)]
    by_group = centred.view(num_rows, num_groups, -1)
    if tensor.zero_points is None:
        by_group -= tensor.scheme.midpoint
    else:
        by_group -= tensor.zero_points[rows].float().unsqueeze(2)
    columns = by_group.shape[2]
    normal = centred.new_empty(num_rows, num_groups, num_groups)
    for group in range(num_groups):
        start = group * columns
        product = by_group[:, group] @ hessian[start : start + columns, start:]  # (rows, in left)
        product *= centred[:, start:]
        later = product.view(num_rows, num_groups - group, columns).sum(dim=2)
        normal[:, group, group:], normal[:, group:, group] = later, later
    rest = weight[rows].float() - (by_group * before.unsqueeze(2)).view_as(centred)
    # Of the change alone: the difference from good scales is small, and keeps its bits.
    right = ((rest @ hessian).view_as(by_group) * by_group).sum(dim=2)
    return _round(before, normal, right, stored)


def _round(before: Tensor, normal: Tensor, right: Tensor, stored: Tensor) -> Tensor:
    found, gain = round_solution(before, normal, right, stored)
    kept = (gain > 0) & (found > 0).all(dim=1)
    return torch.where(kept.unsqueeze(1), found, stored)


def round_solution(
    before: Tensor, normal: Tensor, right: Tensor, stored: Tensor
) -> tuple[Tensor, Tensor]:
    """``before + A^-1 right`` rounded to the element type of ``stored``, and what that gains.

    Args:
        before: ``(rows, unknowns) float32``, ``stored`` in full precision.
        normal: ``A (rows, unknowns, unknowns)``, positive semidefinite.
        right: ``(rows, unknowns)``, of the change from ``before``.
        stored: ``(rows, unknowns)``.

    Returns:
        the unknowns in the element type of ``stored``, and ``(rows,)`` by how much the error falls,
        not positive where no sound solution was found.
    """
    diagonal = normal.diagonal(dim1=1, dim2=2)
    damped = normal.clone()
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(diagonal > 0, _RIDGE * diagonal, 1.0))
    factor, failures = torch.linalg.cholesky_ex(damped)
    wanted = before + torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    found = torch.empty_like(stored)
    off = torch.zeros_like(before)  # how far each unknown ended from the wanted one
    for index in reversed(range(before.shape[1])):
        below = factor[:, index + 1 :, index]
        pull = (below * off[:, index + 1 :]).sum(dim=1) / factor[:, index, index]
        found[:, index] = (wanted[:, index] - pull).to(stored.dtype)
        off[:, index] = found[:, index].float() - wanted[:, index]
    change = found.float() - before
    gain = 2 * (right * change).sum(dim=1) - torch.einsum("rg,rgh,rh->r", change, normal, change)
    sound = (failures == 0) & found.isfinite().all(dim=1) & gain.isfinite()
    return found, torch.where(sound, gain, 0.0)
