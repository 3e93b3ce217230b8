"""A GGUF file behind llama.cpp as a scorer: the gate's criteria through the engine that serves it.

llama.cpp rounds activations to the type of the weights, so its logits differ from those of the
dequantized weights one by one, while perplexity and divergence agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.progress import Progress, silent
from llmopt.serving.llama_cpp_engine import Engine, Step, open_engine
from llmopt_evals.scorer import Branches, Passage, Scores


class LlamaCppScorer:
    """Scores passages with an engine; computes when asked and stores no logits.

    Rows of a passage are computed as they are asked for: going through a passage in order computes
    every token once. A context is computed once for all its continuations, which share its keys
    and values.

    Args:
        engine: the model.
        label: what progress is reported under.
        progress: told of the passages as they are begun.
    """

    def __init__(
        self, engine: Engine, *, label: str = "score in llama.cpp", progress: Progress = silent
    ) -> None:
        self._engine = engine
        self._label = label
        self._progress = progress
        self._cache = _Cache()

    def score(self, sequences: Sequence[Passage]) -> Scores:
        """Scores of the passages; those of earlier calls stay good.

        Raises:
            BadInputError: a passage is longer than what the model was made for.
        """
        longest = max((_longest_path(passage) for passage in sequences), default=0)
        if longest > self._engine.context_length:
            raise BadInputError(
                f"a passage of {longest} tokens is longer than the model's context of "
                f"{self._engine.context_length}",
                "cut the text into shorter blocks",
            )
        self._engine.reserve(
            max((_room(passage) for passage in sequences), default=1),
            max((_num_sequences(passage) for passage in sequences), default=1),
        )
        self._cache.owner = None  # making room may have emptied it
        return _EngineScores(self._engine, self._cache, sequences, self._label, self._progress)


@contextmanager
def llama_cpp_scorer(
    path: Path,
    *,
    threads: int | None = None,
    exact: bool = False,
    progress: Progress = silent,
) -> Iterator[LlamaCppScorer]:
    """A GGUF file as a scorer, its memory given back at the end.

    Args:
        path: the file.
        threads: that compute; the physical cores without a number.
        exact: with keys and values in float32 and without flash attention.
        progress: told of the passages as they are begun.

    Raises:
        BadInputError: llama-cpp-python is not installed, or the file cannot be loaded.
    """
    with open_engine(path, threads=threads, exact=exact) as engine:
        yield LlamaCppScorer(engine, progress=progress)


def _longest_path(passage: Passage) -> int:
    return passage.longest_path if isinstance(passage, Branches) else len(passage)


def _room(passage: Passage) -> int:
    """Places in the cache; a continuation's last token is never computed."""
    if not isinstance(passage, Branches):
        return len(passage)
    return len(passage.context) + sum(len(tokens) - 1 for tokens in passage.continuations)


def _num_sequences(passage: Passage) -> int:
    return 1 + len(passage.continuations) if isinstance(passage, Branches) else 1


@dataclass(slots=True)
class _Cache:
    """What the engine's cache holds: the beginning of one plain sequence, or nothing of use.

    Attributes:
        owner: the scores whose sequence it is.
        sequence: its index there.
        length: how many of its tokens are in the cache.
    """

    owner: object = None
    sequence: int = 0
    length: int = 0


class _EngineScores:
    def __init__(
        self,
        engine: Engine,
        cache: _Cache,
        sequences: Sequence[Passage],
        label: str,
        progress: Progress,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._sequences = sequences
        self._label = label
        self._progress = progress

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        tokens = self._sequences[sequence]
        assert isinstance(tokens, Tensor), "branches have no rows"
        cache = self._cache
        if cache.owner is not self or cache.sequence != sequence or start < cache.length:
            self._begin(sequence)
            cache.owner, cache.sequence, cache.length = self, sequence, 0
        ids = tokens[cache.length : stop].tolist()
        steps = [
            Step(token, place, 0, place >= start) for place, token in enumerate(ids, cache.length)
        ]
        cache.length = stop
        return self._engine.decode(steps)

    def branch_logprobs(self, sequences: Sequence[int]) -> list[Tensor]:
        return [self._branches(sequence) for sequence in sequences]

    def _branches(self, sequence: int) -> Tensor:
        branches = self._sequences[sequence]
        assert isinstance(branches, Branches), "a plain sequence has no branches"
        self._begin(sequence)
        context = branches.context.tolist()
        last = len(context) - 1
        first_row = self._engine.decode(
            [Step(token, place, 0, place == last) for place, token in enumerate(context)]
        )
        steps = []
        for branch, tokens in enumerate(branches.continuations, start=1):
            self._engine.share(branch)
            ids = tokens[:-1].tolist()
            steps += [Step(id_, place, branch, True) for place, id_ in enumerate(ids, last + 1)]
        rows = torch.split(
            self._engine.decode(steps), [len(tokens) - 1 for tokens in branches.continuations]
        )
        return torch.stack(
            [
                _summed(torch.cat([first_row, row]), tokens)
                for row, tokens in zip(rows, branches.continuations, strict=True)
            ]
        )

    def _begin(self, sequence: int) -> None:
        self._progress(self._label, sequence, len(self._sequences))
        self._engine.clear()
        self._cache.owner = None


def _summed(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed log-probability of tokens, each predicted by its row, ``() float64``."""
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None].cpu())
    return logprobs.double().sum()
