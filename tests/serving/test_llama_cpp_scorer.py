"""The scorer over an engine that is played: its logits tell which tokens a row has seen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.serving.llama_cpp_engine import LlamaCppEngine, Step
from llmopt.serving.llama_cpp_scorer import LlamaCppScorer
from llmopt_evals.scorer import Branches

VOCABULARY = 11


def row(seen: Sequence[int]) -> Tensor:
    """Logits after these tokens: of this order and no other."""
    generator = torch.Generator().manual_seed(hash(tuple(seen)) % 2**31)
    return torch.randn(VOCABULARY, generator=generator)


class PlayedEngine:
    """Holds sequences of tokens where llama.cpp holds keys and values."""

    context_length = 20

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        self.room = (0, 0)
        self.num_decoded = 0

    def reserve(self, num_tokens: int, num_sequences: int) -> None:
        self.room = (max(num_tokens, self.room[0]), max(num_sequences, self.room[1]))
        self.clear()

    def clear(self) -> None:
        self.held = {}

    def share(self, sequence: int) -> None:
        self.held[sequence] = list(self.held[0])

    def decode(self, steps: Sequence[Step]) -> Tensor:
        rows = []
        for step in steps:
            seen = self.held.setdefault(step.sequence, [])
            assert step.position == len(seen), "a token is out of place"
            seen.append(step.token)
            self.num_decoded += 1
            rows += [row(seen)] if step.wanted else []
        assert len(self.held) <= self.room[1]
        return torch.stack(rows) if rows else torch.empty(0, VOCABULARY)


PLAIN = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
OTHER = torch.tensor([2, 7, 1])
BRANCHES = Branches(torch.tensor([5, 6, 7]), (torch.tensor([1]), torch.tensor([2, 3, 4])))


def rows_of(tokens: Tensor, start: int, stop: int) -> Tensor:
    return torch.stack([row(tokens[: place + 1].tolist()) for place in range(start, stop)])


def test_rows_in_order_compute_each_token_once() -> None:
    engine = PlayedEngine()
    scores = LlamaCppScorer(engine).score([PLAIN, BRANCHES, OTHER])
    for start, stop in ((0, 3), (3, 4), (6, 8)):
        assert torch.equal(scores.logits(0, start, stop), rows_of(PLAIN, start, stop))
    assert engine.num_decoded == len(PLAIN)
    assert engine.room == (8, 3)


def test_rows_in_any_order_are_the_same() -> None:
    scores = LlamaCppScorer(PlayedEngine()).score([PLAIN, OTHER])
    for sequence, tokens, start, stop in ((0, PLAIN, 4, 6), (1, OTHER, 1, 3), (0, PLAIN, 6, 7)):
        assert torch.equal(scores.logits(sequence, start, stop), rows_of(tokens, start, stop))
    assert torch.equal(scores.logits(0, 2, 7), rows_of(PLAIN, 2, 7))


def test_branches_share_their_context() -> None:
    engine = PlayedEngine()
    scores = LlamaCppScorer(engine).score([OTHER, BRANCHES])
    scores.logits(0, 0, 2)
    (found,) = scores.branch_logprobs([1])
    wanted = []
    for tokens in BRANCHES.continuations:
        path = torch.cat([BRANCHES.context, tokens])
        rows = torch.log_softmax(rows_of(path, 2, len(path) - 1), -1)
        wanted.append(rows.gather(1, tokens[:, None]).double().sum())
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-6)
    assert engine.num_decoded == 2 + 3 + 2  # rows asked for, context, continuations less their last
    assert torch.equal(scores.logits(0, 2, 3), rows_of(OTHER, 2, 3))


def test_scores_of_earlier_calls_stay_good() -> None:
    scorer = LlamaCppScorer(PlayedEngine())
    first, second = scorer.score([PLAIN]), scorer.score([OTHER, PLAIN])
    assert torch.equal(first.logits(0, 0, 3), rows_of(PLAIN, 0, 3))
    assert torch.equal(second.logits(0, 0, 2), rows_of(OTHER, 0, 2))
    assert torch.equal(first.logits(0, 3, 6), rows_of(PLAIN, 3, 6))
    third = scorer.score([OTHER])
    assert torch.equal(first.logits(0, 6, 7), rows_of(PLAIN, 6, 7))
    assert torch.equal(third.logits(0, 1, 2), rows_of(OTHER, 1, 2))


def test_a_passage_beyond_the_context_is_refused() -> None:
    with pytest.raises(BadInputError, match="a passage of 21 tokens"):
        LlamaCppScorer(PlayedEngine()).score([torch.zeros(21, dtype=torch.int64)])


def test_progress_is_told_of_every_passage() -> None:
    told: list[tuple[str, int, int]] = []
    scorer = LlamaCppScorer(PlayedEngine(), progress=lambda *step: told.append(step))
    scores = scorer.score([PLAIN, OTHER])
    scores.logits(0, 0, 4)
    scores.logits(0, 4, 8)
    scores.logits(1, 0, 2)
    assert told == [("score in llama.cpp", 0, 2), ("score in llama.cpp", 1, 2)]


def test_without_llama_cpp_there_is_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInputError, match="llama_cpp is not installed"):
        LlamaCppEngine(tmp_path / "m.gguf")  # type: ignore[operator]
