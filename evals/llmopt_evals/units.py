"""Held-out text as units: what is resampled together, cut into blocks a model can read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_evals.errors import EvaluationError

MIN_UNITS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """The blocks of one source, resampled together.

    Attributes:
        name: the source's name (``a + 2 more`` for short neighbours joined).
        blocks: each ``(T,) int64``; the beginning-of-sequence token included, if there is one.
    """

    name: str
    blocks: tuple[Tensor, ...]

    @property
    def num_predictions(self) -> int:
        """Tokens predicted: every token of a block but its first."""
        return sum(len(block) - 1 for block in self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutText:
    """Units and how they came about.

    Attributes:
        units: in the order of the documents.
        num_sources: sources given.
        num_joined_sources: short sources that were joined with a neighbour into one unit.
        num_dropped_tokens: tokens of short sources left without a neighbour to join.
        bos_token_id: what every block begins with, or none.
    """

    units: tuple[Unit, ...]
    num_sources: int
    num_joined_sources: int
    num_dropped_tokens: int
    bos_token_id: int | None


def documents_from_text(name: str, text: str) -> list[tuple[str, str]]:
    """Split one long text at blank lines into named paragraphs, each to count as a source."""
    paragraphs = [part.strip("\n") for part in re.split(r"\n(?:[ \t]*\n)+", text)]
    return [(f"{name}#{i}", part) for i, part in enumerate(paragraphs) if part.strip()]


def cut_units(
    documents: Iterable[tuple[str, Sequence[int]]],
    *,
    min_tokens: int = 256,
    max_tokens: int = 1024,
    min_units: int = MIN_UNITS,
    bos_token_id: int | None = None,
) -> HeldOutText:
    """Cut documents into units of blocks of ``min_tokens`` to ``max_tokens`` tokens.

    A long document is cut into near-equal blocks; short documents of one source are joined; a
    source shorter than ``min_tokens`` is joined with the short sources that follow it.

    Args:
        documents: (source name, token ids without special tokens); one source may have several
            documents, in succession or not.
        min_tokens: the shortest block.
        max_tokens: the longest block, ``bos_token_id`` included; at least twice ``min_tokens``.
        min_units: fewer units are refused; a bootstrap over fewer says little.
        bos_token_id: put at the head of every block, for models trained so.

    Raises:
        EvaluationError: fewer than ``min_units`` units.
    """
    assert max_tokens >= 2 * min_tokens
    room = max_tokens - (bos_token_id is not None)
    sources: dict[str, list[list[int]]] = {}
    for name, tokens in documents:
        sources.setdefault(name, []).append([int(token) for token in tokens])
    whole: list[tuple[str, list[list[int]]]] = []
    waiting: list[tuple[str, list[int]]] = []
    num_joined = 0
    for name, texts in sources.items():
        pieces = _join_short(texts, min_tokens)
        if len(pieces) > 1 or len(pieces[0]) >= min_tokens:
            whole.append((name, pieces))
            continue
        waiting.append((name, pieces[0]))
        joined = [token for _, tokens in waiting for token in tokens]
        if len(joined) >= min_tokens:
            num_joined += len(waiting)
            whole.append((f"{waiting[0][0]} + {len(waiting) - 1} more", [joined]))
            waiting = []
    units = tuple(
        Unit(name, tuple(_block(b, bos_token_id) for p in pieces for b in _cut(p, room)))
        for name, pieces in whole
    )
    if len(units) < min_units:
        total = sum(len(text) for texts in sources.values() for text in texts)
        raise EvaluationError(
            f"only {len(units)} units can be made of {total} tokens from {len(sources)} sources; "
            f"the gate needs {min_units}",
            f"give more held-out text: at least {min_units} documents of {min_tokens} tokens "
            "(one long text counts as one document unless it is split at blank lines)",
        )
    dropped = sum(len(tokens) for _, tokens in waiting)
    return HeldOutText(units, len(sources), num_joined, dropped, bos_token_id)


def _join_short(texts: Sequence[list[int]], min_tokens: int) -> list[list[int]]:
    """Join texts in order until each piece has ``min_tokens``; a short rest joins the last."""
    pieces: list[list[int]] = [[]]
    for text in texts:
        if len(pieces[-1]) >= min_tokens:
            pieces.append([])
        pieces[-1] = pieces[-1] + text
    if len(pieces) > 1 and len(pieces[-1]) < min_tokens:
        rest = pieces.pop()
        pieces[-1] = pieces[-1] + rest
    return pieces


def _cut(tokens: list[int], room: int) -> list[list[int]]:
    count = math.ceil(len(tokens) / room)
    bounds = [round(i * len(tokens) / count) for i in range(count + 1)]
    return [tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _block(tokens: list[int], bos_token_id: int | None) -> Tensor:
    prefix = [] if bos_token_id is None else [bos_token_id]
    return torch.tensor(prefix + tokens, dtype=torch.int64)
