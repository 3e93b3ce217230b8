"""Requests in flight, and where what becomes of them goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from llmopt.decoding.answer import Answer
from llmopt.decoding.completion import Completion, Delta
from llmopt.decoding.sequence import Request, Sequence
from llmopt.decoding.text.detokenizer import Decoder


class Inbox(Protocol):
    """Takes what steps add to requests; called by whichever thread steps."""

    def put(self, delta: Delta, is_last: bool) -> None:
        """Take a delta; ``is_last``: the last of its request."""

    def fail(self, error: BaseException) -> None:
        """A step failed, and with it every request in flight."""


@dataclass(slots=True)
class Collected:
    """An inbox that is emptied from time to time.

    Attributes:
        deltas: in the order in which they came.
        num_ended: requests whose last delta came.
        error: that ended all of them, to be raised by who waits.
    """

    deltas: list[Delta] = field(default_factory=list)
    num_ended: int = 0
    error: BaseException | None = None

    def put(self, delta: Delta, is_last: bool) -> None:
        """Keep a delta."""
        self.deltas.append(delta)
        self.num_ended += is_last

    def fail(self, error: BaseException) -> None:
        """Keep the error."""
        self.error = error

    def take(self) -> list[Delta]:
        """The deltas since the last call; raises the error, once, if there is one."""
        error, self.error = self.error, None
        if error is not None:
            raise error
        deltas, self.deltas = self.deltas, []
        return deltas


class Posted:
    """An inbox that hands over to an event loop in another thread, while there is one.

    What comes after the loop is closed is dropped: nobody is left to read it.

    Args:
        loop: in which :meth:`get` is awaited.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[tuple[Delta, bool] | BaseException] = asyncio.Queue()

    def put(self, delta: Delta, is_last: bool) -> None:
        """Post a delta."""
        self._post((delta, is_last))

    def fail(self, error: BaseException) -> None:
        """Post the error."""
        self._post(error)

    async def get(self) -> tuple[Delta, bool]:
        """The next delta, and whether it is the last; raises an error that was posted."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _post(self, item: tuple[Delta, bool] | BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            if not self._loop.is_closed():  # asked afterwards: it may be closed at any time
                raise


@dataclass(slots=True)
class Tracked:
    """A request that is not answered yet.

    Attributes:
        request: as the scheduler has it.
        seed: of its random numbers.
        tokenizer: for its text.
        eos_token_ids: that end its answers.
        inbox: where its deltas go.
        num_open: its answers that are not complete.
        answers: those that have begun, by sequence.
    """

    request: Request
    seed: int
    tokenizer: Decoder | None
    eos_token_ids: frozenset[int]
    inbox: Inbox
    num_open: int
    answers: dict[int, Answer] = field(default_factory=dict)

    def answer(self, sequence: Sequence) -> Answer:
        """The answer that a sequence is."""
        if sequence.sequence_id not in self.answers:
            self.answers[sequence.sequence_id] = Answer(
                sequence, self.seed, self.tokenizer, self.eos_token_ids
            )
        return self.answers[sequence.sequence_id]


def in_order(deltas: Iterable[Delta], request_ids: Iterable[str]) -> list[Completion]:
    """The complete answers, by request in the given order and by sample."""
    place = {request_id: index for index, request_id in enumerate(request_ids)}
    completions = [delta.completion for delta in deltas if delta.completion is not None]
    return sorted(completions, key=lambda one: (place[one.request_id], one.sample_index))
