"""The next token of every row that is sampled in a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmopt.decoding.sampling.filters import penalise_repetition, restrict, weigh
from llmopt.decoding.sampling.parameters import SamplingParameters
from llmopt.decoding.sampling.random_numbers import uniforms
from llmopt.errors import NumericalError

_BLOCK = 512
"""Tokens whose weights are summed before a draw looks at single ones."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What is known of a request whose next token is due.

    Attributes:
        parameters: how it is continued.
        seed: of its random numbers, below 2⁶⁴.
        stream: which completion of its prompt this is.
        position: how many tokens it has generated: the coordinate of this draw.
        token_ids: its prompt and what was generated, for the repetition penalty.
        name: what an error calls it.
    """

    parameters: SamplingParameters
    seed: int
    stream: int
    position: int
    token_ids: Sequence[int]
    name: str = "a request"


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token and what the model thought of it, before penalty, temperature and filters.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability.
        top_logprobs: the most probable tokens and theirs, as many as were asked for.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Take or draw the next token of each row.

    A row's token depends on its logits and on its :class:`SamplingRow` alone.

    Args:
        logits: ``(rows, vocabulary) float32``, on any device.
        rows: one for each row of logits.

    Raises:
        NumericalError: NaN or infinity in a row's logits (minus infinity rules a token out).
    """
    logprobs = logits.log_softmax(dim=-1)
    for row, largest in zip(rows, logprobs.amax(dim=-1).tolist(), strict=True):
        if not math.isfinite(largest):
            raise NumericalError(
                f"the model gave NaN or infinity in the logits of token {len(row.token_ids)} of "
                f"{row.name}",
                "try dtype=torch.float32; if it persists, the checkpoint is damaged "
                "(llmopt eval measures it)",
            )
    token_ids = _choose(logits, rows)
    chosen: list[float] = logprobs.gather(1, token_ids[:, None])[:, 0].tolist()
    top = _most_probable(logprobs, rows)
    return [
        SampledToken(token_id, logprob, best)
        for token_id, logprob, best in zip(token_ids.tolist(), chosen, top, strict=True)
    ]


def probabilities(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The distribution that each row is drawn from; a greedy row's lies on one token.

    Args:
        logits: ``(rows, vocabulary) float32``.
        rows: one for each row of logits.

    Returns:
        ``(rows, vocabulary) float64``, rows summing to 1.
    """
    result = torch.zeros_like(logits, dtype=torch.float64)
    penalised = _penalised(logits, rows)
    greedy, drawn = _partition(rows)
    if greedy:
        result[greedy, penalised[greedy].argmax(dim=-1)] = 1
    if drawn:
        weights = _weights(penalised[drawn], [rows[index] for index in drawn]).double()
        result[drawn] = weights / weights.sum(dim=-1, keepdim=True)
    return result


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """``(rows,) int64``."""
    logits = _penalised(logits, rows)
    greedy, drawn = _partition(rows)
    if not drawn:
        return logits.argmax(dim=-1)
    drawn_rows = [rows[index] for index in drawn]
    numbers = uniforms(
        np.array([row.seed for row in drawn_rows], dtype=np.uint64),
        [row.stream for row in drawn_rows],
        [row.position for row in drawn_rows],
    )
    weights = _weights(logits if not greedy else logits[drawn], drawn_rows)
    picked = invert(weights, torch.from_numpy(numbers).to(logits.device))
    if not greedy:
        return picked
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    chosen[drawn] = picked
    chosen[greedy] = logits[greedy].argmax(dim=-1)
    return chosen


def invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The token at which a row's cumulative weight passes ``number`` times its total.

    Tokens stand in the order of the vocabulary. Sums of blocks come first: a float64 running sum
    over a large vocabulary is slower than all else here.

    Args:
        weights: ``(rows, vocabulary) float32``, none negative, some positive in each row.
        numbers: ``(rows,) float64`` in [0, 1).

    Returns:
        ``(rows,) int64`` tokens of positive weight.
    """
    vocabulary = weights.shape[1]
    whole = vocabulary - vocabulary % _BLOCK
    sums = weights[:, :whole].view(len(weights), -1, _BLOCK).sum(dim=-1, dtype=torch.float64)
    rest = weights[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64)
    held = torch.cat([sums, rest], dim=1).cumsum(dim=1)
    total = held[:, -1:]
    # Below the total, however the product is rounded: the block found then has weight.
    target = torch.minimum(
        numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    block = torch.searchsorted(held, target, right=True)
    before = held.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0)
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    outside = places >= vocabulary
    inner = weights.gather(1, places.clamp_(max=vocabulary - 1)).double().masked_fill_(outside, 0)
    offset = torch.searchsorted(before + inner.cumsum(dim=1), target, right=True)
    # Summed in another order, a block may end a rounding error short of its target: then the last
    # token of positive weight in it is meant.
    last = torch.where(inner > 0, torch.arange(_BLOCK, device=weights.device), 0).amax(1, True)
    offset = torch.minimum(offset, last)
    return (block * _BLOCK + offset)[:, 0]


def _weights(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """``(rows, vocabulary) float32`` unnormalised probabilities; all rows have a temperature."""
    parameters = [row.parameters for row in rows]
    device, vocabulary = logits.device, logits.shape[1]
    weights = weigh(logits, torch.tensor([p.temperature for p in parameters], device=device))
    if not any(p.restricted for p in parameters):
        return weights
    top_k = [min(p.top_k or vocabulary, vocabulary) for p in parameters]
    return restrict(
        weights,
        torch.tensor(top_k, device=device),
        torch.tensor([p.top_p for p in parameters], dtype=torch.float64, device=device),
        torch.tensor([p.min_p for p in parameters], device=device),
    )


def _penalised(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The logits after repetition penalties; a copy where there is one."""
    penalised = [i for i, row in enumerate(rows) if row.parameters.repetition_penalty != 1]
    if penalised:
        logits = logits.clone()
    for index in penalised:
        row = rows[index]
        penalise_repetition(logits[index], row.token_ids, row.parameters.repetition_penalty)
    return logits


def _partition(rows: Sequence[SamplingRow]) -> tuple[list[int], list[int]]:
    """Indices of the greedy rows, and of those that are drawn."""
    greedy = [index for index, row in enumerate(rows) if row.parameters.greedy]
    drawn = [index for index, row in enumerate(rows) if not row.parameters.greedy]
    return greedy, drawn


def _most_probable(
    logprobs: Tensor, rows: Sequence[SamplingRow]
) -> list[tuple[tuple[int, float], ...]]:
    asked = [row.parameters.logprobs or 0 for row in rows]
    if not any(asked):
        return [()] * len(rows)
    values, indices = logprobs.topk(min(max(asked), logprobs.shape[1]), dim=-1)
    pairs = zip(indices.tolist(), values.tolist(), asked, strict=True)
    return [tuple(zip(ids[:count], best[:count], strict=True)) for ids, best, count in pairs]
