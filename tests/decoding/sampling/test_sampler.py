from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from support.sampling_reference import reference_distribution

from llmopt.decoding.sampling.parameters import SamplingParameters
from llmopt.decoding.sampling.sampler import SamplingRow, invert, sample
from llmopt.errors import NumericalError

DRAWS = [
    SamplingParameters(temperature=1.0),
    SamplingParameters(temperature=0.5, top_p=0.95),
    SamplingParameters(temperature=1.4, top_k=12, min_p=0.02, repetition_penalty=1.2),
]


def make_logits(vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", [3, 511, 512, 513, 1400])
def test_evenly_spread_numbers_give_each_token_its_share(vocabulary: int) -> None:
    """A test without chance: of N evenly spread numbers a token gets N p of them, at most 1 off."""
    weights = make_logits(vocabulary).softmax(dim=-1)[None]
    weights[0, ::5] = 0
    count = 10_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = invert(weights.expand(count, -1), numbers)
    shares = torch.bincount(tokens, minlength=vocabulary)
    expected = (weights[0].double() / weights.double().sum()) * count
    assert (shares - expected).abs().max() < 1.01
    assert torch.equal(tokens, tokens.sort().values)  # in the order of the vocabulary


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("vocabulary", [1, 2, 512, 1025])
def test_the_ends_of_the_unit_interval_give_a_token_with_weight(
    number: float, vocabulary: int
) -> None:
    weights = torch.zeros(1, vocabulary)
    for place in {0, vocabulary // 2, vocabulary - 1}:
        weights.zero_()
        weights[0, place] = 1e-30
        assert invert(weights, torch.tensor([number]).double()).tolist() == [place]


@pytest.mark.parametrize("parameters", DRAWS)
def test_drawn_tokens_follow_the_reference_distribution(parameters: SamplingParameters) -> None:
    logits, seen, count = make_logits(60), [2, 7], 20_000
    rows = [SamplingRow(parameters, 11, 0, position, seen) for position in range(count)]
    tokens = [token.token_id for token in sample(logits.expand(count, -1), rows)]
    expected = reference_distribution(logits.numpy(), parameters, seen)
    observed = np.bincount(tokens, minlength=60)
    assert pooled_chi_square(observed, expected * count) > 1e-3


def test_that_test_would_see_a_filter_that_is_slightly_off() -> None:
    """Its power: top-p 0.93 in the place of 0.95, and temperature 0.52 in the place of 0.5."""
    logits, count = make_logits(60), 20_000
    expected = reference_distribution(logits.numpy(), DRAWS[1], []) * count
    for wrong in (
        SamplingParameters(temperature=0.5, top_p=0.93),
        SamplingParameters(temperature=0.52, top_p=0.95),
    ):
        rows = [SamplingRow(wrong, 11, 0, position, []) for position in range(count)]
        tokens = [token.token_id for token in sample(logits.expand(count, -1), rows)]
        assert pooled_chi_square(np.bincount(tokens, minlength=60), expected) < 1e-5


def pooled_chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """The p-value of Pearson's test; what is expected fewer than 20 times counts as one cell."""
    if observed[expected == 0].any():
        return 0.0
    common = expected >= 20
    counts = np.append(observed[common], observed[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    filled = wanted > 0
    return float(stats.chisquare(counts[filled], wanted[filled]).pvalue)


def mixed_batch() -> tuple[torch.Tensor, list[SamplingRow]]:
    rows, logits = [], []
    options = [*DRAWS, SamplingParameters(), SamplingParameters(repetition_penalty=1.3, logprobs=3)]
    for index in range(15):
        parameters = options[index % len(options)]
        rows.append(SamplingRow(parameters, 100 + index, index % 2, index, [1, index]))
        logits.append(make_logits(1003, seed=index))
    return torch.stack(logits), rows


def test_a_row_gives_the_same_alone_and_in_any_batch() -> None:
    logits, rows = mixed_batch()
    together = sample(logits, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits[order], [rows[index] for index in order])
    for index, row in enumerate(rows):
        (alone,) = sample(logits[index : index + 1], [row])
        assert alone.token_id == together[index].token_id
        assert alone.token_id == shuffled[order.index(index)].token_id
        assert alone.logprob == pytest.approx(together[index].logprob, abs=1e-5)


def test_the_logits_are_left_as_they_were() -> None:
    logits, rows = mixed_batch()
    before = logits.clone()
    sample(logits, rows)
    assert torch.equal(logits, before)


def test_greedy_rows_take_the_most_probable_token() -> None:
    logits = torch.stack([make_logits(300, seed) for seed in range(6)])
    rows = [SamplingRow(SamplingParameters(), seed, 0, 0, []) for seed in range(6)]
    assert [t.token_id for t in sample(logits, rows)] == logits.argmax(dim=-1).tolist()
    scaled = SamplingParameters(repetition_penalty=50.0)
    best, second = logits[0].topk(2).indices.tolist()
    assert logits[0, second] > 0
    (token,) = sample(logits[:1], [SamplingRow(scaled, 0, 0, 0, [best])])
    assert token.token_id == second


def test_logprobs_are_the_models_own_before_penalty_temperature_and_filters() -> None:
    logits, rows = mixed_batch()
    expected = logits.double().log_softmax(dim=-1)
    for index, token in enumerate(sample(logits, rows)):
        assert token.logprob == pytest.approx(float(expected[index, token.token_id]), abs=1e-5)
        best = expected[index].topk(rows[index].parameters.logprobs or 0)
        assert [token_id for token_id, _ in token.top_logprobs] == best.indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist())


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    row = SamplingRow(SamplingParameters(logprobs=50), 0, 0, 0, [])
    (token,) = sample(make_logits(7)[None], [row])
    assert sorted(token_id for token_id, _ in token.top_logprobs) == list(range(7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("parameters", [SamplingParameters(), DRAWS[1]])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_request(
    bad: float, parameters: SamplingParameters
) -> None:
    logits = torch.stack([make_logits(700, seed) for seed in range(2)])
    logits[1, 650] = bad
    rows = [SamplingRow(parameters, 0, 0, 0, [1, 2], name) for name in ("left", "right")]
    with pytest.raises(NumericalError, match="token 2 of right"):
        sample(logits, rows)


def test_a_token_ruled_out_by_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((400, 50), -torch.inf)
    logits[:, [3, 49]] = 1.0
    hot = SamplingParameters(temperature=100.0)
    rows = [SamplingRow(hot, 1, 0, position, [0]) for position in range(400)]
    assert {token.token_id for token in sample(logits, rows)} == {3, 49}
