"""A runner and a sampler without a model: pages are prefixes, the next token a hash of them."""

from collections.abc import Callable
from random import Random

from support.page_contents import PageContents

from llmopt.decoding.paging.manager import PageManager
from llmopt.decoding.scheduler import ScheduledStep, Scheduler
from llmopt.decoding.sequence import FinishReason, Request, Sequence

VOCABULARY = 3


def next_token(token_ids: list[int], sample_index: int) -> int:
    """The token that follows; of another sample another one."""
    return Random(repr((token_ids, sample_index))).randrange(VOCABULARY)


def expected_answer(request: Request, sample_index: int) -> list[int]:
    """What a request is answered with, whatever runs beside it."""
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.max_new_tokens):
        token_ids.append(next_token(token_ids, sample_index))
    return token_ids[len(request.prompt_token_ids) :]


class FakeEngine:
    """Schedules, runs and samples; holds the pages' contents against what each chunk reads."""

    def __init__(self, scheduler: Scheduler, pages: PageManager) -> None:
        self.scheduler = scheduler
        self.contents = PageContents(pages.groups, pages.page_size)
        self.finished: list[Sequence] = []

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> ScheduledStep:
        """One step; ``meanwhile`` is called while the forward runs."""
        step = self.scheduler.schedule()
        self._run(step)
        meanwhile()
        rows = self.scheduler.advance(step)
        assert len(rows) == sum(chunk.samples for chunk in step.chunks)
        for sequence in [sequence for row in rows for sequence in row]:
            token_id = next_token(sequence.token_ids, sequence.sample_index)
            self.scheduler.append(sequence, token_id)
            if sequence.num_generated_tokens == sequence.request.max_new_tokens:
                self.scheduler.finish(sequence, FinishReason.LENGTH)
                self.finished.append(sequence)
        return step

    def _run(self, step: ScheduledStep) -> None:
        self.contents.copy(step.copies)
        for chunk in step.chunks:
            token_ids = chunk.sequence.token_ids[: chunk.start + chunk.num_tokens]
            for name, table in chunk.tables.items():
                self.contents.write(name, table, token_ids, chunk.start)
        for chunk in step.chunks:  # all have written before any reads
            token_ids = chunk.sequence.token_ids[: chunk.start + chunk.num_tokens]
            for name, table in chunk.tables.items():
                self.contents.check_readable(name, table, token_ids, chunk.start)
