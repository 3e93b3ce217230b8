"""What GPTQ takes from a Hessian: the order of solving and the feedback between columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import NumericalError

_MAX_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class Factor:
    """The factor ``U`` of ``H = (I + U) D (I + U)^T``, ``U`` strictly upper triangular.

    Attributes:
        feedback: ``(in, in) float32``, ``U`` transposed: row ``k`` weighs the errors of the columns
            solved before ``k``; zero from the diagonal on.
        damping: the damping fraction it took.
        num_factorizations: how many were tried, 1 if the first succeeded.
    """

    feedback: Tensor
    damping: float
    num_factorizations: int


def check_hessian(hessian: Tensor) -> None:
    """Raise NumericalError if an element is NaN or infinite."""
    if not bool(torch.isfinite(hessian).all()):
        raise NumericalError(
            "NaN or infinity in a Hessian",
            "the calibration text drives this layer out of range: calibrate in bfloat16 or "
            "float32, or leave the sample out",
        )


def energy_order(hessian: Tensor) -> Tensor:
    """Columns by decreasing activation energy, ties left to right: ``(in,) int64``."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def factorize(hessian: Tensor, order: Tensor | None, damping: float) -> Factor:
    """Factor ``hessian (in, in) float32``, its columns taken in ``order``.

    ``damping`` times the mean of the diagonal is added to the diagonal, ten times more after each
    failure. A dead column (zero diagonal) is coupled to no other, so it feeds nothing back.

    Raises:
        NumericalError: if damping beyond 1.0 would be needed.
    """
    # Reversed, because Cholesky gives lower factors and an upper one is wanted.
    columns = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = columns.flip(0)
    diagonal = hessian.diagonal()[backwards]
    mean = float(diagonal.mean())
    unit = mean if mean > 0 else 1.0
    live = torch.where(diagonal == 0, unit, diagonal)
    failure = torch.empty((), dtype=torch.int32, device=hessian.device)
    num_factorizations = 0
    while damping <= _MAX_DAMPING * (1 + 1e-9):
        num_factorizations += 1
        # Taken anew for every try and factored where it lies, column-major as LAPACK has it: of a
        # wide layer a Hessian is the largest thing in memory, and each copy counts.
        lower = hessian.t()[backwards.unsqueeze(1), backwards].t()
        lower.diagonal().copy_(live + damping * unit)
        torch.linalg.cholesky_ex(lower, out=(lower, failure))
        if int(failure) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return Factor(_feedback(lower), damping, num_factorizations)
        damping = damping * 10 if damping > 0 else 0.01
    raise NumericalError(
        f"a Hessian is not positive definite after {num_factorizations} attempts, the last with "
        f"{_MAX_DAMPING:g} times its mean diagonal added",
        "calibrate on more text; if this layer hardly sees any, quantize it with solver rtn",
    )


def conditional_feedback(feedback: Tensor) -> Tensor:
    """The same feedback for residuals instead of errors: ``V = I - (I + U)^-1``, transposed.

    With ``U``, sums over the first columns mean nothing to a column much further on; with ``V``
    they are its best value given those columns alone, as in the paper's form.
    """
    identity = torch.eye(feedback.shape[0], dtype=feedback.dtype, device=feedback.device)
    inverse = torch.linalg.solve_triangular(feedback, identity, upper=False, unitriangular=True)
    return identity.sub_(inverse).contiguous()


def _feedback(lower: Tensor) -> Tensor:
    """The factor's columns over their diagonal, back in order, transposed; overwrites ``lower``."""
    diagonal = lower.diagonal().flip(0).clone()
    feedback = lower.t().flip(0, 1).contiguous()
    feedback.div_(diagonal.unsqueeze(1)).diagonal().zero_()
    return feedback
