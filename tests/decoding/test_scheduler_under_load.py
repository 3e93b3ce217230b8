"""Hundreds of requests over pools too small for them, some cancelled at any time."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_runner import VOCABULARY, FakeEngine, expected_answer

from llmopt.decoding.limits import SchedulerOptions
from llmopt.decoding.paging.groups import PageGroup
from llmopt.decoding.paging.manager import PageManager
from llmopt.decoding.scheduler import ScheduledStep, Scheduler
from llmopt.decoding.sequence import Request, Sequence
from llmopt.errors import BadInputError

PAGE_SIZE = 4
FULL = PageGroup("full", None, 14)
INT4 = (PageGroup("recent", 9, 12), PageGroup("quantized", None, 12, full_pages_only=True))
WINDOWS = (FULL, PageGroup("window", 6, 9))


class Load:
    """Requests of random lengths, submitted and cancelled at random while steps run."""

    def __init__(
        self,
        random: Random,
        groups: tuple[PageGroup, ...],
        options: SchedulerOptions,
        num_requests: int,
        samples: tuple[int, ...] = (1, 1, 1, 2, 3),
    ) -> None:
        self.random = random
        self.options = options
        self.samples = samples
        self.pages = PageManager(groups, PAGE_SIZE, reuse_prefixes=random.random() < 0.8)
        self.engine = FakeEngine(Scheduler(self.pages, options), self.pages)
        self.requests = [self._request(str(index)) for index in range(num_requests)]
        self.refused: set[str] = set()
        self.cancelled: set[str] = set()
        self.num_steps = 0
        self.num_preemptions: Counter[int] = Counter()
        self.admitted_at: dict[int, int] = {}
        self.fewest_steps_held = PAGE_SIZE

    def run(self) -> None:
        """All requests, to the last answer."""
        pending = list(reversed(self.requests))
        while pending or self.engine.scheduler.has_work:
            for _ in range(self.random.randrange(4)):
                if pending:
                    self._submit(pending.pop())
            if self.random.random() < 0.03:
                self._cancel_one()
            before = self.engine.scheduler.running
            decoding = [s for s in before if s.num_uncomputed_tokens == 1]
            step = self.engine.step(meanwhile=self._sometimes_cancel)
            self._watch_preemptions(before)
            self._check_step(step)
            self._check_age_order(step)
            scheduled = {chunk.sequence.sequence_id for chunk in step.chunks}
            for sequence in decoding:
                is_delayed = sequence.sequence_id not in scheduled
                # Without a page it waits, as the youngest, or is preempted by an older one.
                assert not is_delayed or step.chunks[-1].sequence.age < sequence.age

    def _request(self, name: str) -> Request:
        random = self.random
        shared = [0, 1, 2, 0, 0, 1, 1, 2, 2][: random.choice((0, 5, 9))]
        own = [random.randrange(VOCABULARY) for _ in range(random.randrange(0, 40))]
        num_new, num_samples = random.randrange(1, 20), random.choice(self.samples)
        return Request(name, tuple(shared + own), num_new, num_samples)

    def _submit(self, request: Request) -> None:
        num_tokens = len(request.prompt_token_ids) + request.max_new_tokens
        could_fit = num_tokens <= self.options.max_context and self.pages.fits(num_tokens - 1)
        try:
            self.engine.scheduler.submit(request)
        except BadInputError:
            could_fit = could_fit and request.num_samples <= self.options.max_sequences
            assert not could_fit or not request.prompt_token_ids
            self.refused.add(request.request_id)

    def _cancel_one(self) -> None:
        scheduler = self.engine.scheduler
        there = [*scheduler.running, *scheduler.waiting]
        if there:
            name = self.random.choice(there).request.request_id
            assert scheduler.cancel(name)
            self.cancelled.add(name)

    def _sometimes_cancel(self) -> None:
        if self.random.random() < 0.03:
            self._cancel_one()

    def _check_step(self, step: ScheduledStep) -> None:
        options = self.options
        assert step.num_tokens <= options.max_tokens_per_step
        assert len({chunk.sequence.sequence_id for chunk in step.chunks}) == len(step.chunks)
        assert len(step.chunks) <= options.max_sequences
        targets = [(copy.group, copy.target) for copy in step.copies]
        assert len(set(targets)) == len(targets)
        for chunk in step.chunks:
            assert 1 <= chunk.num_tokens <= options.chunk

    def _watch_preemptions(self, before: tuple[Sequence, ...]) -> None:
        """Note how often a sequence is sent back, and how soon after it was let in."""
        self.num_steps += 1
        for sequence in before:
            if sequence.num_preemptions > self.num_preemptions[sequence.sequence_id]:
                held = self.num_steps - self.admitted_at.pop(sequence.sequence_id)
                self.fewest_steps_held = min(self.fewest_steps_held, held)
                self.num_preemptions[sequence.sequence_id] += 1
        for sequence in self.engine.scheduler.running:
            self.admitted_at.setdefault(sequence.sequence_id, self.num_steps)

    def _check_age_order(self, step: ScheduledStep) -> None:
        """Nobody is overtaken, and the oldest comes on in every step."""
        scheduler = self.engine.scheduler
        ages = [sequence.age for sequence in [*scheduler.running, *scheduler.waiting]]
        assert ages == sorted(ages)
        assert len(scheduler.running) <= self.options.max_sequences
        if ages and step.chunks:
            assert step.chunks[0].sequence.age <= ages[0]

    def check_answers(self) -> None:
        answers = {
            (sequence.request.request_id, sequence.sample_index): sequence.generated_token_ids
            for sequence in self.engine.finished
        }
        for request in self.requests:
            samples = range(request.num_samples)
            there = [index for index in samples if (request.request_id, index) in answers]
            for index in there:
                assert answers[request.request_id, index] == expected_answer(request, index)
            if request.request_id in self.refused:
                assert not there
            elif request.request_id not in self.cancelled:
                assert there == list(samples)
        free = self.pages.num_free_pages()
        assert free == {group.name: group.num_pages for group in self.pages.groups}


@pytest.mark.parametrize("groups", [(FULL,), INT4, WINDOWS], ids=["full", "int4", "windows"])
def test_500_requests_are_answered_or_refused_and_all_pages_returned(
    groups: tuple[PageGroup, ...],
) -> None:
    options = SchedulerOptions(50, max_sequences=6, max_tokens_per_step=16, prefill_chunk=11)
    load = Load(Random(6), groups, options, 500)
    load.run()
    load.check_answers()
    assert load.fewest_steps_held > 1, "let in to be thrown out at once"
    assert max(load.num_preemptions.values()) <= 4
    assert load.refused and load.cancelled and len(load.engine.finished) > 300
    assert any(sequence.num_reused_tokens for sequence in load.engine.finished)


@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(1, 24),
    window=st.none() | st.integers(1, 12),
    max_sequences=st.integers(1, 6),
    tokens_over=st.integers(0, 20),
    prefill_chunk=st.none() | st.integers(1, 12),
)
def test_any_limits(
    seed: int,
    num_pages: int,
    window: int | None,
    max_sequences: int,
    tokens_over: int,
    prefill_chunk: int | None,
) -> None:
    groups = (
        PageGroup("one", window, num_pages),
        PageGroup("two", None, num_pages, full_pages_only=True),
    )
    options = SchedulerOptions(50, max_sequences, max_sequences + tokens_over, prefill_chunk)
    load = Load(Random(seed), groups, options, 25)
    load.run()
    load.check_answers()


@given(seed=st.integers(0, 2**32), num_pages=st.integers(14, 24), max_sequences=st.integers(2, 6))
def test_who_is_let_in_stays_until_an_older_one_has_filled_a_page(
    seed: int, num_pages: int, max_sequences: int
) -> None:
    options = SchedulerOptions(50, max_sequences, max_sequences + 6)
    groups = (PageGroup("full", None, num_pages), PageGroup("window", 6, num_pages - 4))
    load = Load(Random(seed), groups, options, 25, samples=(1,))
    load.run()
    assert load.fewest_steps_held >= PAGE_SIZE - 1
