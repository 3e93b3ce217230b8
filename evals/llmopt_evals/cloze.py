"""A cloze task from any held-out text: which of four continuations is the true one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llmopt_evals.errors import EvaluationError, NotFiniteError
from llmopt_evals.scorer import Branches
from llmopt_evals.units import Unit

_MAX_DRAWS = 200  # of distractors, for one item, before its place is given up


class ClozeOptions(BaseModel):
    """How items are made; ``num_items`` is the least number at the first look."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_items: int = Field(default=2000, ge=1)
    context_tokens: int = Field(default=24, ge=1)
    continuation_tokens: int = Field(default=6, ge=1)
    num_choices: int = Field(default=4, ge=2)


@dataclass(frozen=True, slots=True, eq=False)
class ClozeItem:
    """One question.

    Attributes:
        unit: index of the unit that it was taken from.
        branches: the context and the choices, in the order shown.
        answer: index of the true continuation.
    """

    unit: int
    branches: Branches
    answer: int


def make_items(
    units: Sequence[Unit],
    num_items: int,
    options: ClozeOptions,
    *,
    least: int,
    seed: int,
    bos_token_id: int | None = None,
) -> list[ClozeItem]:
    """``num_items`` items, or as many as the text holds, spread over the units by their length.

    True continuations do not overlap one another. Distractors come from elsewhere in the same
    unit: they overlap neither the item's own text nor each other, and all choices differ.

    Args:
        units: where the text is taken from.
        num_items: how many are wanted.
        options: lengths and number of choices.
        least: how many there must be.
        seed: of the places, the distractors and the order of the choices.
        bos_token_id: put before the context, for models trained so (it heads the blocks too).

    Raises:
        EvaluationError: fewer than ``least`` can be made.
    """
    places = [
        (index, block, start)
        for index, unit in enumerate(units)
        for block, tokens in enumerate(unit.blocks)
        for start in _starts(len(tokens), options, bos_token_id is not None)
    ]
    rng = np.random.default_rng(seed)
    flat = [[block.numpy()[bos_token_id is not None :] for block in unit.blocks] for unit in units]
    skip = int(bos_token_id is not None)
    items: list[ClozeItem] = []
    for place in rng.permutation(len(places)):
        if len(items) == num_items:
            break
        unit, block, start = places[place]
        item = _item(flat[unit], unit, block, start - skip, options, rng, bos_token_id)
        if item is not None:
            items.append(item)
    if len(items) < least:
        raise EvaluationError(
            f"only {len(items)} cloze items can be made of the {len(units)} units of the first "
            f"look; the gate needs {least}",
            f"give more held-out text: about {least / max(1, len(items)):.1f} times as much",
        )
    return sorted(items, key=lambda item: item.unit)


def _starts(length: int, options: ClozeOptions, has_bos: bool) -> range:
    first = options.context_tokens + has_bos
    return range(first, length - options.continuation_tokens + 1, options.continuation_tokens)


def _item(
    blocks: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]],
    unit: int,
    block: int,
    start: int,
    options: ClozeOptions,
    rng: np.random.Generator,
    bos_token_id: int | None,
) -> ClozeItem | None:
    length = options.continuation_tokens
    context_start = start - options.context_tokens
    taken = [(block, context_start, start + length)]
    choices = [blocks[block][start : start + length]]
    seen = {choices[0].tobytes()}
    lengths = np.array([max(0, len(tokens) - length + 1) for tokens in blocks])
    ends = np.cumsum(lengths)
    for draw in rng.integers(0, ends[-1], size=_MAX_DRAWS):
        other = int(np.searchsorted(ends, draw, side="right"))
        place = int(draw - (ends[other] - lengths[other]))
        tokens = blocks[other][place : place + length]
        clash = any(b == other and place < e and place + length > s for b, s, e in taken)
        if clash or tokens.tobytes() in seen:
            continue
        taken.append((other, place, place + length))
        seen.add(tokens.tobytes())
        choices.append(tokens)
        if len(choices) == options.num_choices:
            break
    else:
        return None
    order = rng.permutation(options.num_choices)
    head = [] if bos_token_id is None else [bos_token_id]
    context = torch.tensor(head + blocks[block][context_start:start].tolist(), dtype=torch.int64)
    shown = tuple(torch.from_numpy(choices[i].copy()) for i in order)
    return ClozeItem(unit, Branches(context, shown), int(np.flatnonzero(order == 0)[0]))


def is_correct(item: ClozeItem, logprobs: Tensor, model: str) -> bool:
    """Whether the choice of the largest summed log-probability is the true one.

    Raises:
        NotFiniteError: a log-probability is NaN; names ``model``.
    """
    if bool(torch.isnan(logprobs).any()):
        raise NotFiniteError(model, f"in a cloze item of unit {item.unit}")
    return int(logprobs.argmax()) == item.answer
