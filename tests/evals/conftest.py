"""Tiny random models and a Scorer that is a table of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from llmopt_evals.scorer import Passage, Scores, score_expanded

VOCAB = 61


class TableScorer:
    """Logits depend on the last two tokens through a table; ``noise`` is added to the table."""

    def __init__(self, seed: int = 0, noise: float = 0.0, scale: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCAB, VOCAB, generator=generator) * scale
        other = torch.Generator().manual_seed(seed + 1)
        self.table = self.table + noise * torch.randn(VOCAB, VOCAB, generator=other)
        self.num_scored = 0

    def score(self, sequences: Sequence[Passage]) -> Scores:
        return score_expanded(self._plain, sequences)

    def _plain(self, sequences: Sequence[Tensor]) -> TableScores:
        self.num_scored += len(sequences)
        return TableScores(self.table, sequences)


class TableScores:
    def __init__(self, table: Tensor, sequences: Sequence[Tensor]) -> None:
        self.table, self.sequences = table, sequences

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        tokens = self.sequences[sequence]
        before = torch.cat([tokens[:1], tokens[:-1]])
        return (self.table[tokens] + 0.3 * self.table[before])[start:stop]


def sample_text(num_documents: int, length: int, seed: int = 7) -> list[tuple[str, list[int]]]:
    """Documents drawn from the noiseless table itself, so that its model knows them."""
    probabilities = torch.softmax(TableScorer().table, dim=-1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (num_documents, 1), generator=generator)
    rows = [tokens]
    for _ in range(length - 1):
        tokens = torch.multinomial(probabilities[tokens[:, 0]], 1, generator=generator)
        rows.append(tokens)
    whole = torch.cat(rows, dim=1)
    return [(f"document {i}", row.tolist()) for i, row in enumerate(whole)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share: two threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def table_scorer() -> Callable[..., TableScorer]:
    return TableScorer


@pytest.fixture(scope="session")
def documents() -> list[tuple[str, list[int]]]:
    return sample_text(64, 300)
