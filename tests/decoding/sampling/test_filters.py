from __future__ import annotations

import numpy as np
import pytest
import torch
from support.sampling_reference import reference_distribution
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmopt.decoding.sampling.filters import restrict, weigh
from llmopt.decoding.sampling.parameters import SamplingParameters
from llmopt.decoding.sampling.sampler import SamplingRow, probabilities

PARAMETERS = [
    SamplingParameters(temperature=1.0),
    SamplingParameters(temperature=0.3),
    SamplingParameters(temperature=2.5, top_k=7),
    SamplingParameters(temperature=1.0, top_k=1),
    SamplingParameters(temperature=1.0, top_k=10_000),
    SamplingParameters(temperature=1.0, top_p=0.9),
    SamplingParameters(temperature=1.3, top_p=0.999),
    SamplingParameters(temperature=1.0, top_p=1e-6),
    SamplingParameters(temperature=0.7, min_p=0.05),
    SamplingParameters(temperature=1.0, min_p=1.0),
    SamplingParameters(temperature=0.9, top_k=40, top_p=0.8, min_p=0.1, repetition_penalty=1.3),
    SamplingParameters(temperature=1.1, repetition_penalty=0.6),
    SamplingParameters(repetition_penalty=1.5),
    SamplingParameters(),
]


def make_logits(kind: str, rows: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    if kind == "flat":  # top-p must look far beyond its first look
        logits *= 0.01
    if kind == "ties":  # as bfloat16 gives them
        logits = (logits * 2).round() / 2
    if kind == "ruled out":
        logits[:, ::3] = -torch.inf
    return logits


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "ruled out"])
@pytest.mark.parametrize("vocabulary", [5, 97, 2051])
def test_a_batch_of_rows_has_the_distributions_of_the_definitions(
    kind: str, vocabulary: int
) -> None:
    logits = make_logits(kind, len(PARAMETERS), vocabulary)
    seen = [1, 4, 4, 3]
    rows = [SamplingRow(parameters, 0, 0, 0, seen) for parameters in PARAMETERS]
    for row, logit, actual in zip(rows, logits, probabilities(logits, rows), strict=True):
        expected = reference_distribution(logit.numpy(), row.parameters, seen)
        assert np.array_equal(actual.numpy() > 0, expected > 1e-40), row.parameters
        np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("parameters", [p for p in PARAMETERS if not p.greedy])
def test_the_filters_are_those_of_transformers_in_its_order(parameters: SamplingParameters) -> None:
    vocabulary, seen = 1009, [3, 9, 9, 100]
    logits = make_logits("peaked", 1, vocabulary)
    warpers = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty),
            TemperatureLogitsWarper(parameters.temperature),
            TopKLogitsWarper(parameters.top_k or vocabulary),
            TopPLogitsWarper(parameters.top_p),
            MinPLogitsWarper(parameters.min_p),
        ]
    )
    expected = warpers(torch.tensor([seen]), logits.double()).softmax(dim=-1)
    actual = probabilities(logits, [SamplingRow(parameters, 0, 0, 0, seen)])
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-12)


def test_equal_logits_stay_or_go_together_wherever_they_stand() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0, 1.0]])
    weights = weigh(logits, torch.ones(1))
    for top_k, top_p, kept in ((1, 1.0, 2), (2, 1.0, 2), (3, 1.0, 5), (6, 0.9, 5), (6, 0.4, 2)):
        limits = (torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.zeros(1))
        for order in (torch.arange(6), torch.arange(5, -1, -1)):
            left = restrict(weights[:, order].clone(), *limits)
            assert int((left > 0).sum()) == kept
            lightest_kept = logits[:, order][left > 0].min()
            assert torch.equal(left > 0, logits[:, order] >= lightest_kept)


def test_the_nucleus_of_a_row_does_not_depend_on_its_neighbours() -> None:
    peaked, flat = make_logits("peaked", 4, 3000), make_logits("flat", 4, 3000)
    logits = torch.cat([peaked, flat])[torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])]
    rows = [
        SamplingRow(SamplingParameters(temperature=1.0, top_p=0.3 + 0.08 * index), 0, 0, 0, [])
        for index in range(8)
    ]
    together = probabilities(logits, rows)
    for index, row in enumerate(rows):
        assert torch.equal(together[index], probabilities(logits[index : index + 1], [row])[0])
