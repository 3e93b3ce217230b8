import numpy as np
import pytest
import torch

from llmopt_evals import divergence
from llmopt_evals.divergence import kl_divergence, measure_block
from llmopt_evals.errors import EvaluationError


class FixedScores:
    def __init__(self, logits: torch.Tensor) -> None:
        self.table = logits

    def logits(self, sequence: int, start: int, stop: int) -> torch.Tensor:
        return self.table[start:stop]

    def branch_logprobs(self, sequences: object) -> list[torch.Tensor]:
        raise AssertionError


def exact_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [(1e-4, 2e-3), (1e-3, 2e-4), (1e-2, 1e-5), (1.0, 1e-5), (30.0, 1e-5), (300.0, 1e-5)],
)
def test_kl_is_the_float64_one(change: float, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(33, 1009, generator=generator)
    b = a + change * torch.randn(33, 1009, generator=generator)
    expected = exact_kl(a, b)
    error = (kl_divergence(a, b).double() - expected).abs() / expected
    assert float(error.max()) < tolerance


def test_block_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_MIN_ASKED_ROWS", 5)
    monkeypatch.setattr(divergence, "_ASKED_ELEMENTS", 71 * 13)
    monkeypatch.setattr(divergence, "_COMPARED_ELEMENTS", 71 * 4)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(37, 71, generator=generator)
    others = [a + 0.5 * torch.randn(37, 71, generator=generator), a.clone()]
    tokens = torch.randint(0, 71, (38,), generator=generator)
    measured = measure_block(
        tokens, 0, FixedScores(a), [FixedScores(b) for b in others], ["x", "y"], "unit"
    )
    for b, result in zip(others, measured, strict=True):
        nll = torch.nn.functional.cross_entropy(b, tokens[1:], reduction="none")
        np.testing.assert_allclose(result.nll_candidate, nll, rtol=1e-5)
        nll = torch.nn.functional.cross_entropy(a, tokens[1:], reduction="none")
        np.testing.assert_allclose(result.nll_reference, nll, rtol=1e-5)
        np.testing.assert_allclose(result.kl, exact_kl(a, b), rtol=1e-4)
        assert (result.agrees == (a.argmax(-1) == b.argmax(-1)).numpy()).all()
    assert not measured[1].kl.any(), "identical logits have a KL of exactly zero"


@pytest.mark.parametrize("who", ["reference", "candidate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_named(who: str, value: float) -> None:
    tables = {name: torch.zeros(9, 5) for name in ("reference", "candidate")}
    tables[who][6, 2] = value
    with pytest.raises(EvaluationError, match=f"{who}.*'chapter 3'"):
        measure_block(
            torch.zeros(10, dtype=torch.int64),
            0,
            FixedScores(tables["reference"]),
            [FixedScores(tables["candidate"])],
            ["candidate"],
            "chapter 3",
        )
