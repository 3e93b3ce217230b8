"""Requests that every engine gets alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt.calibration.text import read_documents
from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.errors import BadInputError

CHECK = "check"
MIXED = "mixed"
CHECK_LENGTHS = (17, 64, 130, 200)
CHECK_TOKENS = 32
CHECK_LONGEST = 1024  # no prompt of the check is longer, whatever is measured
MIXED_REQUESTS = 16
MIXED_LONGEST = 1024  # no prompt of the mixed requests is longer
_MIXED_SHORTEST = 16
_MIXED_NEW = (16, 128)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are submitted together.

    Attributes:
        name: ``check``, ``mixed``, or ``BATCHxCONTEXT``.
        prompts: token ids of each.
        new_tokens: how many each wants; none ends early.
        repeats: runs that count.
        warm_ups: runs before them.
        wants_gaps: whether the reference tells its lead at every token.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    repeats: int = 1
    warm_ups: int = 0
    wants_gaps: bool = False

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.prompts)

    @property
    def mean_context(self) -> float:
        """Tokens in the cache, on average over the decode steps of a request, weighted alike."""
        spans = zip(self.prompts, self.new_tokens, strict=True)
        weighted = sum((len(prompt) + new / 2) * new for prompt, new in spans)
        return weighted / sum(self.new_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(len(p) + n for p, n in zip(self.prompts, self.new_tokens, strict=True))


def cell_name(batch: int, context: int) -> str:
    """What a batch of prompts of one length is called."""
    return f"{batch}x{context}"


def plan_workloads(
    stream: Sequence[int],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    longest: int | None,
    seed: int = 0,
) -> list[Workload]:
    """The check, a cell for every batch and context, and the mixed requests.

    Args:
        stream: token ids of a text.
        batches: numbers of requests.
        contexts: tokens of a prompt.
        new_tokens: that each request of a cell wants.
        repeats: runs that count.
        longest: context of the model, if it has one; the mixed requests and the check keep to it.
        seed: of the mixed requests' lengths.

    Raises:
        BadInputError: too little text for a prompt, a single new token (nothing lies between it
            and the next), a context too short for mixed requests.
    """
    if new_tokens < 2:
        raise BadInputError(
            f"{new_tokens} new tokens have no time between two tokens", "ask for 2 or more"
        )
    most = MIXED_LONGEST if longest is None else min(MIXED_LONGEST, longest - _MIXED_NEW[1])
    if most <= _MIXED_SHORTEST:
        raise BadInputError(
            f"a model's context of {longest} leaves mixed requests of up to {_MIXED_NEW[1]} new "
            f"tokens no prompts of more than {_MIXED_SHORTEST}",
            f"choose a model with a context of more than {_MIXED_NEW[1] + _MIXED_SHORTEST}",
        )
    prompts = _Prompts(stream)
    check_lengths = _check_lengths(contexts, longest)
    check = Workload(
        CHECK,
        tuple(prompts.take(length) for length in check_lengths),
        (CHECK_TOKENS,) * len(check_lengths),
        wants_gaps=True,
    )
    cells = [
        Workload(
            cell_name(batch, context),
            tuple(prompts.take(context) for _ in range(batch)),
            (new_tokens,) * batch,
            repeats,
            warm_ups=1,
        )
        for context in contexts
        for batch in batches
    ]
    numbers = random.Random(seed)
    # As many short prompts as long ones on a logarithmic scale, as of chats and documents.
    lengths = [
        round(_MIXED_SHORTEST * (most / _MIXED_SHORTEST) ** numbers.random())
        for _ in range(MIXED_REQUESTS)
    ]
    mixed = Workload(
        MIXED,
        tuple(prompts.take(length) for length in lengths),
        tuple(numbers.randint(*_MIXED_NEW) for _ in lengths),
        repeats,
        warm_ups=1,
    )
    return [check, *cells, mixed]


def _check_lengths(contexts: Sequence[int], longest: int | None) -> list[int]:
    """Of the check's prompts: short ones, and the largest measured context where it is longer."""
    room = CHECK_LONGEST if longest is None else min(CHECK_LONGEST, longest - CHECK_TOKENS)
    wanted = (*CHECK_LENGTHS, max(*CHECK_LENGTHS, *contexts))
    return sorted({min(length, room) for length in wanted})


def token_stream(model: Path) -> list[int]:
    """The built-in text's evaluation split in the model's tokens.

    Raises:
        BadInputError: a tokenizer that cannot be opened.
    """
    tokenizer = load_tokenizer(model).tokenizer
    documents = read_documents("builtin", split="evaluation", tokenizer=tokenizer)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


class _Prompts:
    """Pieces of a stream, none like another while it lasts, then from elsewhere in it."""

    def __init__(self, stream: Sequence[int]) -> None:
        self._stream = stream
        self._start = 0

    def take(self, length: int) -> tuple[int, ...]:
        if length > len(self._stream):
            raise BadInputError(
                f"the text has {len(self._stream):,} tokens, and a prompt is to have {length:,}",
                "choose shorter contexts",
            )
        if self._start + length > len(self._stream):
            # An odd step: the second round cuts the text at other places than the first.
            self._start = (self._start + length) % 997 % (len(self._stream) - length + 1)
        piece = tuple(self._stream[self._start : self._start + length])
        self._start += length
        return piece
