"""Tokens in, logits out: the only face of a model that the gate sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Progress = Callable[[str, int, int], None]
"""``(task label, completed, total)``."""


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """One context and several continuations of it, scored with the context computed once.

    Attributes:
        context: ``(C,) int64``, C >= 1.
        continuations: each ``(L,) int64``, L >= 1; lengths may differ.
    """

    context: Tensor
    continuations: tuple[Tensor, ...]

    @property
    def longest_path(self) -> int:
        """Tokens of the longest context-with-continuation (the distance attention must span)."""
        return len(self.context) + max(len(tokens) for tokens in self.continuations)


Passage = Tensor | Branches
"""What a scorer is given: a plain ``(T,) int64`` sequence, or branches."""


class Scores(Protocol):
    """What a model says about passages; indices are into the list that was given to ``score``."""

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        """``(stop - start, vocab) float32`` of a plain sequence; row p predicts token p + 1."""
        ...

    def branch_logprobs(self, sequences: Sequence[int]) -> list[Tensor]:
        """For each of the ``Branches`` named: ``(num_branches,) float64`` summed log-probs."""
        ...


class Scorer(Protocol):
    """A model: in memory, walked block by block from disk, or behind an engine."""

    def score(self, sequences: Sequence[Passage]) -> Scores:
        """Score passages; computation may be done here or when the scores are asked for."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PackedBranches:
    """``Branches`` laid out in one row: context, then each continuation less its last token.

    Attributes:
        token_ids: ``(T,) int64``.
        position_ids: ``(T,) int64``; every continuation starts again after the context.
        mask: ``(T, T) bool``, true where row attends to column.
        first_row: the first row whose logits are needed (the context's last token).
        rows: ``(N,) int64`` relative to ``first_row``: where token n is predicted.
        targets: ``(N,) int64``: the continuation tokens, one continuation after the other.
        owners: ``(N,) int64``: which continuation token n belongs to.
        num_branches: the number of continuations.
    """

    token_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    first_row: int
    rows: Tensor
    targets: Tensor
    owners: Tensor
    num_branches: int


def pack_branches(branches: Branches) -> PackedBranches:
    """Lay branches out in one row for a 4-D attention mask (tree attention, one level deep).

    Right only where attention reaches ``branches.longest_path`` tokens back: for a sliding
    window shorter than that, expand instead.
    """
    context_length = len(branches.context)
    lengths = [len(tokens) for tokens in branches.continuations]
    token_ids = torch.cat([branches.context, *(tokens[:-1] for tokens in branches.continuations)])
    position_ids = torch.cat(
        [
            torch.arange(context_length),
            *(torch.arange(context_length, context_length + length - 1) for length in lengths),
        ]
    )
    segment = torch.cat(
        [
            torch.zeros(context_length, dtype=torch.int64),
            *(torch.full((length - 1,), index + 1) for index, length in enumerate(lengths)),
        ]
    )
    visible = (segment[None, :] == 0) | (segment[:, None] == segment[None, :])
    rows, start = [], 1
    for length in lengths:  # token 0 is predicted by the context's last row, relative row 0
        rows.append(
            torch.cat([torch.zeros(1, dtype=torch.int64), start + torch.arange(length - 1)])
        )
        start += length - 1
    return PackedBranches(
        token_ids=token_ids,
        position_ids=position_ids,
        mask=torch.tril(visible),
        first_row=context_length - 1,
        rows=torch.cat(rows),
        targets=torch.cat(list(branches.continuations)),
        owners=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        num_branches=len(lengths),
    )


def sum_branches(packed: PackedBranches, logits: Tensor) -> Tensor:
    """Summed log-probability of each continuation, ``(num_branches,) float64``.

    Args:
        packed: the row's layout.
        logits: ``(T - first_row, vocab) float32``, of rows ``first_row`` to the end.
    """
    normalisers = torch.logsumexp(logits, dim=-1)
    logprobs = logits[packed.rows, packed.targets] - normalisers[packed.rows]
    sums = torch.zeros(packed.num_branches, dtype=torch.float64)
    return sums.index_add_(0, packed.owners, logprobs.double().cpu())


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``(T, T) bool`` to ``(1, 1, T, T)`` of 0 and the dtype's minimum, as transformers adds it.

    Additive, since eager attention adds whatever it is given (a boolean would be added as 0/1).
    """
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)[
        None, None
    ]


class PlainScores(Protocol):
    """Scores of an engine that knows plain sequences only."""

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        """As ``Scores.logits``."""
        ...


class _ExpandedScores:
    def __init__(self, plain: PlainScores, first: list[int], sequences: Sequence[Passage]) -> None:
        self._plain = plain
        self._first = first
        self._sequences = sequences

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        return self._plain.logits(self._first[sequence], start, stop)

    def branch_logprobs(self, sequences: Sequence[int]) -> list[Tensor]:
        return [self._one(sequence) for sequence in sequences]

    def _one(self, sequence: int) -> Tensor:
        branches = self._sequences[sequence]
        assert isinstance(branches, Branches)
        start = len(branches.context) - 1
        sums = []
        for offset, tokens in enumerate(branches.continuations):
            logits = self._plain.logits(self._first[sequence] + offset, start, start + len(tokens))
            logprobs = torch.log_softmax(logits, dim=-1).gather(
                1, tokens[:, None].to(logits.device)
            )
            sums.append(logprobs.double().sum().cpu())
        return torch.stack(sums)


def score_expanded(
    score_plain: Callable[[Sequence[Tensor]], PlainScores], sequences: Sequence[Passage]
) -> Scores:
    """Scores of any passages from an engine that takes plain sequences only.

    Each branch becomes a plain sequence of its own (context and continuation).
    """
    plain: list[Tensor] = []
    first: list[int] = []
    for passage in sequences:
        first.append(len(plain))
        if isinstance(passage, Branches):
            plain.extend(torch.cat([passage.context, tokens]) for tokens in passage.continuations)
        else:
            plain.append(passage)
    return _ExpandedScores(score_plain(plain), first, sequences)
