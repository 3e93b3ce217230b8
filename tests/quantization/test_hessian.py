"""The factor of a Hessian, bit for bit that of the formula written out with copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmopt.quantization.hessian import energy_order, factorize


def written_out(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """Take columns backwards, damp, factor, turn round, divide by the diagonal."""
    backwards = order.flip(0)
    taken = hessian[backwards][:, backwards]
    taken.diagonal().add_(damping * float(taken.diagonal().mean()))
    upper = torch.linalg.cholesky(taken).flip(0, 1)
    return (upper.t() / upper.diagonal().unsqueeze(1)).tril(-1)


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_the_factor_is_that_of_the_elements_given(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(3 * size, size, generator=generator)
    hessian = inputs.T @ inputs
    # Sums of products differ in their last bits above and below the diagonal, and here more.
    hessian += torch.randn(size, size, generator=generator).triu(1) * 1e-3
    before, order = hessian.clone(), energy_order(hessian)
    factor = factorize(hessian, order, 0.01)
    assert torch.equal(factor.feedback, written_out(hessian, order, 0.01))
    assert factor.feedback.is_contiguous() and torch.equal(hessian, before)
    assert (factor.damping, factor.num_factorizations) == (0.01, 1)


def test_every_try_begins_with_the_hessian_itself() -> None:
    hessian = torch.ones(4, 4) - 0.05 * torch.eye(4)  # one eigenvalue positive, three negative
    order = torch.arange(4)
    factor = factorize(hessian, order, 0.001)
    assert (factor.damping, factor.num_factorizations) == (pytest.approx(0.1), 3)
    torch.testing.assert_close(factor.feedback, written_out(hessian, order, factor.damping))
