"""A transformers causal language model, in memory, as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmopt_evals.errors import EvaluationError
from llmopt_evals.scorer import (
    Branches,
    Passage,
    Scores,
    additive_mask,
    pack_branches,
    score_expanded,
    sum_branches,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGITS_PER_FORWARD = 1 << 24  # elements; 64 MiB in float32


class TransformersScorer:
    """Scores with a ``transformers`` causal language model held in memory.

    Nothing is stored but the logits of the last batch; asking in order computes each batch once.

    Args:
        model: any causal LM of transformers, in evaluation mode.
        batch_size: plain sequences a forward (right-padded). Another value than the reference's
            gives another batch shape: that is how the noise floor is measured.
        pack: score branches in one row under a 4-D mask; else each branch is its own sequence.
            Branches longer than the model's attention window are always expanded.

    Raises:
        EvaluationError: on ``score``, if a sequence is longer than the model's context.
    """

    def __init__(self, model: PreTrainedModel, *, batch_size: int = 1, pack: bool = True) -> None:
        self._model = model
        model.train(False)
        self._batch_size = batch_size
        config = model.config.get_text_config()
        self._max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._window: int | None = getattr(config, "sliding_window", None) if pack else 0
        self._vocab_size: int = config.vocab_size

    def score(self, sequences: Sequence[Passage]) -> Scores:
        """Scores of the passages, computed when asked for."""
        longest = max((_length(passage) for passage in sequences), default=0)
        if self._max_positions is not None and longest > self._max_positions:
            raise EvaluationError(
                f"a passage of {longest} tokens is longer than the model's context of "
                f"{self._max_positions}",
                f"cut the text into blocks of at most {self._max_positions} tokens",
            )
        branched = [passage for passage in sequences if isinstance(passage, Branches)]
        if self._window is not None and any(b.longest_path > self._window for b in branched):
            return score_expanded(self._score_packed, sequences)
        return self._score_packed(sequences)

    def _score_packed(self, sequences: Sequence[Passage]) -> _LazyScores:
        return _LazyScores(self._model, sequences, self._batch_size, self._vocab_size)


def _length(passage: Passage) -> int:
    return passage.longest_path if isinstance(passage, Branches) else len(passage)


class _LazyScores:
    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequence[Passage],
        batch_size: int,
        vocab_size: int,
    ) -> None:
        self._model = model
        self._sequences = sequences
        self._vocab_size = vocab_size
        plain = [i for i, passage in enumerate(sequences) if isinstance(passage, Tensor)]
        batches = [tuple(plain[i : i + batch_size]) for i in range(0, len(plain), batch_size)]
        self._batch_of = {i: batch for batch in batches for i in batch}
        self._cached: tuple[int, ...] = ()
        self._cached_logits = torch.empty(0)

    @torch.inference_mode()
    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        batch = self._batch_of[sequence]
        if batch != self._cached:
            rows = [self._sequences[i] for i in batch]
            # Right padding is unseen under causal attention, so no mask is needed.
            token_ids = torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True)  # type: ignore[list-item]  # plain by construction
            self._cached_logits = self._model(
                input_ids=token_ids.to(self._model.device), use_cache=False
            ).logits
            self._cached = batch
        return self._cached_logits[batch.index(sequence), start:stop].float()

    @torch.inference_mode()
    def branch_logprobs(self, sequences: Sequence[int]) -> list[Tensor]:
        """Items of one shape share a forward; the order of the answer is that of the question."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, sequence in enumerate(sequences):
            passage = self._sequences[sequence]
            assert isinstance(passage, Branches)
            shape = (len(passage.context), *(len(tokens) for tokens in passage.continuations))
            shapes.setdefault(shape, []).append(place)
        answers: dict[int, Tensor] = {}
        for shape, places in shapes.items():
            rows = 1 + sum(shape[1:]) - len(shape[1:])
            step = max(1, _LOGITS_PER_FORWARD // (rows * self._vocab_size))
            step = min(step, max(1, 4096 // sum(shape)))  # rows of a cache-friendly product
            for first in range(0, len(places), step):
                some = places[first : first + step]
                answers.update(
                    zip(some, self._forward([sequences[place] for place in some]), strict=True)
                )
        return [answers[place] for place in range(len(sequences))]

    def _forward(self, sequences: Sequence[int]) -> list[Tensor]:
        packed = [pack_branches(self._sequences[i]) for i in sequences]  # type: ignore[arg-type]  # branches by construction
        model, first = self._model, packed[0]
        logits = model(
            input_ids=torch.stack([row.token_ids for row in packed]).to(model.device),
            position_ids=first.position_ids.expand(len(packed), -1).to(model.device),
            attention_mask=additive_mask(first.mask, model.dtype).to(model.device),
            use_cache=False,
            logits_to_keep=torch.arange(first.first_row, len(first.token_ids)).to(model.device),
        ).logits.float()
        return [sum_branches(row, logits[i]) for i, row in enumerate(packed)]
