"""Which tokens of which sequences the next step computes.

Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, arXiv:2403.02310) and
preemption by recomputation (vLLM, arXiv:2309.06180). One rule keeps it fair: **the older comes
first**, in the queue, for pages, and for what a step has left for prompts. So

- every running sequence is older than every waiting one; nobody is overtaken;
- the oldest is never preempted, and one sequence fits the pools alone, so it comes to its end;
- a sequence that decodes is in every step, however long the prompts beside it: steps keep one token
  for each of them before prompts share the rest.

A new sequence is let in only when the pages that it and all running ones will need for the tokens
known so far are free, and a page more for each. So a sequence is not let in to be thrown out at
once: between two preemptions of one sequence the older ones have filled at least a page.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmopt.decoding.limits import SchedulerOptions, check_request
from llmopt.decoding.paging.groups import PageCopy, PageTable
from llmopt.decoding.paging.manager import PageManager
from llmopt.decoding.sequence import FinishReason, Request, Sequence
from llmopt.errors import BadInputError


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence that a step computes.

    Attributes:
        sequence: whose tokens they are.
        start: position of the first of them; all before it are in the cache.
        num_tokens: at least one.
        tables: of each page group, the pages that the sequence holds during the step, those of the
            chunk's tokens among them.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    tables: Mapping[str, PageTable]

    @property
    def token_ids(self) -> list[int]:
        """The tokens that are computed."""
        return self.sequence.token_ids[self.start : self.start + self.num_tokens]

    @property
    def samples(self) -> bool:
        """Whether it ends with the last known token: its logits say the next, not yet appended."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One forward: copy the pages, then write and attend chunk by chunk.

    Attributes:
        chunks: at most one a sequence, oldest sequence first.
        copies: to be made in this order before anything is written.
    """

    chunks: tuple[ScheduledChunk, ...]
    copies: tuple[PageCopy, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Requests in, steps out.

    A step is ``schedule``, the runner's forward, ``advance``, and for each sequence that
    ``advance`` returns a token: ``append``, then ``finish`` where it was the last. Nothing here
    waits or runs by itself; calls from several threads need the caller's lock.

    Args:
        pages: the manager of the pools' pages, used by nobody else meanwhile.
        options: the limits.
    """

    def __init__(self, pages: PageManager, options: SchedulerOptions) -> None:
        self.pages = pages
        self.options = options
        self._waiting: list[Sequence] = []  # oldest first, as is the next
        self._running: list[Sequence] = []
        self._num_submitted = 0
        self._num_sequences = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unanswered."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that hold pages, oldest first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences that hold none, oldest first."""
        return tuple(self._waiting)

    def submit(self, request: Request) -> Sequence:
        """Queue a request.

        Returns:
            Its first sequence; the further samples' come from ``advance``.

        Raises:
            BadInputError: it could never be answered within the limits and pools.
        """
        if any(other.request.request_id == request.request_id for other in self._unfinished()):
            raise BadInputError(
                f"request {request.request_id!r} is there already", "give each request its own id"
            )
        check_request(request, self.options, self.pages)
        sequence = self._new_sequence(request, self._num_submitted, 0)
        sequence.num_unforked = request.num_samples - 1
        sequence.token_ids = list(request.prompt_token_ids)
        self._num_submitted += 1
        self._waiting.append(sequence)
        return sequence

    def schedule(self) -> ScheduledStep:
        """Choose the next step's tokens and reserve their pages.

        Returns:
            The step; it has no chunk only when no request is unanswered.
        """
        chunks: list[ScheduledChunk] = []
        copies: list[PageCopy] = []
        budget = self.options.max_tokens_per_step - sum(map(_decodes, self._running))
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            wanted = 1 if _decodes(sequence) else self._chunk(sequence, budget)
            num_tokens = self._make_room(sequence, wanted)
            if num_tokens:
                budget -= 0 if _decodes(sequence) else num_tokens
                self._reserve(sequence, num_tokens, chunks, copies)
            position += 1
        while budget and self._may_admit():
            sequence = self._admit()
            num_tokens = self._make_room(sequence, self._chunk(sequence, budget))
            assert num_tokens, "a sequence was let in without room for a token"
            budget -= num_tokens
            self._reserve(sequence, num_tokens, chunks, copies)
        assert chunks or not self.has_work
        return ScheduledStep(tuple(chunks), tuple(copies))

    def advance(self, step: ScheduledStep) -> list[list[Sequence]]:
        """Count the step's tokens as computed; its forward has run.

        Returns:
            For each of the step's chunks that samples, in order, the sequences to sample a token
            for from its row of logits: one; all ``num_samples`` after a prompt; none where the
            request was cancelled meanwhile.
        """
        rows: list[list[Sequence]] = []
        for chunk in step.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            if sequence.finish_reason is None:
                self.pages.commit(sequence.sequence_id, sequence.token_ids[chunk.start : end])
                sequence.num_computed_tokens = end
            if chunk.samples:
                is_wanted = sequence.finish_reason is None
                rows.append([sequence, *self._fork(sequence)] if is_wanted else [])
        return rows

    def append(self, sequence: Sequence, token_id: int) -> None:
        """Add a sampled token to a sequence that ``advance`` returned."""
        assert sequence.finish_reason is None and not sequence.num_uncomputed_tokens
        assert sequence.num_generated_tokens < sequence.request.max_new_tokens
        sequence.token_ids.append(token_id)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence out, running or waiting, and give its pages back."""
        assert sequence.finish_reason is None
        sequence.finish_reason = reason
        if sequence in self._running:
            self._running.remove(sequence)
            self.pages.release(sequence.sequence_id)
        else:
            self._waiting.remove(sequence)

    def cancel(self, request_id: str) -> list[Sequence]:
        """Take all unfinished sequences of a request out; between any two calls.

        Returns:
            Those sequences; none where the request is unknown or was answered.
        """
        found = [
            sequence for sequence in self._unfinished() if sequence.request.request_id == request_id
        ]
        for sequence in found:
            self.finish(sequence, FinishReason.CANCELLED)
        return found

    def _unfinished(self) -> list[Sequence]:
        """All sequences, oldest first."""
        return [*self._running, *self._waiting]

    def _new_sequence(self, request: Request, arrival: int, sample_index: int) -> Sequence:
        self._num_sequences += 1
        return Sequence(request, self._num_sequences, arrival, sample_index)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens of a prompt that a step with ``budget`` tokens left takes."""
        return min(sequence.num_uncomputed_tokens, self.options.chunk, budget)

    def _make_room(self, sequence: Sequence, wanted: int) -> int:
        """How many tokens, up to ``wanted``, a sequence can be extended by.

        Where there is no page for a single token, the youngest is preempted, and so on.

        Returns:
            The tokens; none where the sequence is the youngest itself: then it keeps what it has
            and waits for the older ones.
        """
        while not (num_tokens := self._most_tokens(sequence, wanted)):
            if not wanted or self._running[-1] is sequence:
                break
            self._preempt(self._running[-1])
        return num_tokens

    def _most_tokens(self, sequence: Sequence, wanted: int) -> int:
        """The most tokens, up to ``wanted``, that a sequence can be extended by now."""
        return bisect.bisect_left(
            range(1, wanted + 1),
            True,
            key=lambda count: not self.pages.can_extend(sequence.sequence_id, count),
        )

    def _reserve(
        self,
        sequence: Sequence,
        num_tokens: int,
        chunks: list[ScheduledChunk],
        copies: list[PageCopy],
    ) -> None:
        """Put the next tokens of a sequence into the step; the pages are known to be there."""
        copies += self.pages.extend(sequence.sequence_id, num_tokens)
        tables = self.pages.tables(sequence.sequence_id)
        chunks.append(ScheduledChunk(sequence, sequence.num_computed_tokens, num_tokens, tables))

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; it is to be computed anew."""
        self._running.remove(sequence)
        self.pages.release(sequence.sequence_id)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        bisect.insort(self._waiting, sequence, key=lambda other: other.age)

    def _may_admit(self) -> bool:
        """Whether the oldest waiting sequence can join those that run."""
        if not self._waiting:
            return False
        if not self._running:
            return True
        head = self._waiting[0]
        if sum(map(_places, self._running)) + _places(head) > self.options.max_sequences:
            return False
        spare = list(self.pages.num_free_pages().values())
        for sequence in self._running:
            num_tokens = len(sequence.token_ids) + 1
            wanted = self.pages.pages_to_grow(sequence.sequence_id, num_tokens)
            spare = _less(spare, wanted, _places(sequence))
        if min(spare) < _places(head):  # before the prompt's pages are looked up
            return False
        wanted = self.pages.pages_to_admit(head.token_ids, len(head.token_ids) + 1)
        return min(_less(spare, wanted, _places(head))) >= 0

    def _admit(self) -> Sequence:
        """Let the oldest waiting sequence run, from what the cache has of it on."""
        sequence = self._waiting.pop(0)
        num_expected = sequence.request.max_computed_tokens
        reused = self.pages.admit(sequence.sequence_id, sequence.token_ids, num_expected)
        sequence.num_computed_tokens = sequence.num_reused_tokens = reused
        self._running.append(sequence)
        return sequence

    def _fork(self, parent: Sequence) -> Iterator[Sequence]:
        """The further samples of a request whose prompt is computed, each running from now on."""
        while parent.num_unforked:
            sample_index = parent.request.num_samples - parent.num_unforked
            child = self._new_sequence(parent.request, parent.arrival, sample_index)
            child.token_ids = list(parent.token_ids)
            child.num_computed_tokens = parent.num_computed_tokens
            child.num_reused_tokens = parent.num_reused_tokens
            self.pages.fork(parent.sequence_id, child.sequence_id)
            bisect.insort(self._running, child, key=lambda other: other.age)
            parent.num_unforked -= 1
            yield child


def _decodes(sequence: Sequence) -> bool:
    """Whether only the newest token is to be computed."""
    return sequence.num_uncomputed_tokens == 1


def _places(sequence: Sequence) -> int:
    """Of the ``max_sequences``, those taken: its unforked samples run soon."""
    return 1 + sequence.num_unforked


def _less(pages: list[int], wanted: list[int], more: int) -> list[int]:
    """What is left of each group's pages after those wanted and ``more``."""
    return [number - taken - more for number, taken in zip(pages, wanted, strict=True)]
