"""Steps that are fair, within their limits, and compute what each sequence would alone."""

import dataclasses
from random import Random

import pytest
from support.fake_runner import VOCABULARY, FakeEngine, expected_answer

from llmopt.decoding.limits import SchedulerOptions
from llmopt.decoding.paging.groups import PageGroup
from llmopt.decoding.paging.manager import PageManager
from llmopt.decoding.scheduler import ScheduledStep, Scheduler
from llmopt.decoding.sequence import FinishReason, Request
from llmopt.errors import BadInputError

PAGE_SIZE = 4


def engine(
    *groups: PageGroup, max_context: int = 64, reuse_prefixes: bool = True, **options: int
) -> FakeEngine:
    pages = PageManager(groups or (PageGroup("full", None, 16),), PAGE_SIZE, reuse_prefixes)
    return FakeEngine(Scheduler(pages, SchedulerOptions(max_context, **options)), pages)


def request(name: str, num_prompt: int, max_new_tokens: int = 4, num_samples: int = 1) -> Request:
    random = Random(name)
    prompt = tuple(random.randrange(VOCABULARY) for _ in range(num_prompt))
    return Request(name, prompt, max_new_tokens, num_samples)


def chunks(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(c.sequence.request.request_id, c.start, c.num_tokens) for c in step.chunks]


def test_a_prompt_is_computed_in_chunks_beside_what_decodes() -> None:
    run = engine(max_tokens_per_step=8, max_sequences=4, prefill_chunk=6)
    run.scheduler.submit(request("short", 3))
    run.scheduler.submit(request("long", 16))
    assert chunks(run.step()) == [("short", 0, 3), ("long", 0, 5)]
    assert chunks(run.step()) == [("short", 3, 1), ("long", 5, 6)]
    assert chunks(run.step()) == [("short", 4, 1), ("long", 11, 5)]
    assert chunks(run.step()) == [("short", 5, 1), ("long", 16, 1)]
    assert [s.finish_reason for s in run.finished] == [FinishReason.LENGTH]


def test_no_more_run_than_may() -> None:
    run = engine(max_tokens_per_step=64, max_sequences=3)
    run.scheduler.submit(request("a", 3, num_samples=2))
    run.scheduler.submit(request("b", 3, num_samples=2))
    run.scheduler.submit(request("c", 3))
    assert chunks(run.step()) == [("a", 0, 3)], "the second sample has its place already"
    assert len(run.scheduler.running) == 2
    assert [s.request.request_id for s in run.scheduler.waiting] == ["b", "c"], "c does not pass b"


def test_samples_fork_off_the_computed_prompt() -> None:
    run = engine(max_tokens_per_step=64, max_sequences=3)
    asked = request("a", 6, max_new_tokens=5, num_samples=3)
    run.scheduler.submit(asked)
    steps = []
    while run.scheduler.has_work:
        steps.append(run.step())
    assert [step.num_tokens for step in steps] == [6, 3, 3, 3, 3]
    assert [len(step.copies) for step in steps] == [0, 2, 0, 0, 0], "one keeps the shared page"
    answers = {s.sample_index: s.generated_token_ids for s in run.finished}
    assert answers == {index: expected_answer(asked, index) for index in range(3)}


def test_the_youngest_makes_room_and_comes_back_first() -> None:
    run = engine(PageGroup("full", None, 7), max_sequences=3, reuse_prefixes=False)
    for name in ("old", "young", "late"):
        run.scheduler.submit(request(name, 4, max_new_tokens=16))
    while not any(s.num_preemptions for s in run.scheduler.waiting):
        run.step()
    assert [s.request.request_id for s in run.scheduler.running] == ["old"]
    assert [s.request.request_id for s in run.scheduler.waiting] == ["young", "late"]
    assert run.scheduler.waiting[0].num_computed_tokens == 0
    while run.scheduler.has_work:
        run.step()
    assert [s.request.request_id for s in run.finished] == ["old", "young", "late"]
    for sequence in run.finished:
        assert sequence.generated_token_ids == expected_answer(sequence.request, 0)


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    run = engine(PageGroup("full", None, 8), max_sequences=2)
    run.scheduler.submit(request("old", 4, max_new_tokens=15))
    young = run.scheduler.submit(request("young", 6, max_new_tokens=20))
    while run.scheduler.has_work:
        run.step()
    assert young.num_preemptions == 1
    assert young.num_reused_tokens > 0
    assert young.generated_token_ids == expected_answer(young.request, 0)


def test_a_prompt_that_others_hold_takes_no_room_twice() -> None:
    run = engine(PageGroup("full", None, 9), max_sequences=2)
    first = request("first", 21, max_new_tokens=8)
    run.scheduler.submit(first)
    run.step()
    run.scheduler.submit(dataclasses.replace(first, request_id="second"))
    assert chunks(run.step()) == [("first", 21, 1), ("second", 20, 1)]


def test_a_window_needs_room_for_one_chunk_and_not_for_one_of_each() -> None:
    max_sequences, max_tokens_per_step, window = 6, 24, 6
    num_pages = max_sequences * (-(-window // PAGE_SIZE) + 2) + max_tokens_per_step // PAGE_SIZE
    run = engine(
        PageGroup("full", None, 99),
        PageGroup("window", window, num_pages),
        max_sequences=max_sequences,
        max_tokens_per_step=max_tokens_per_step,
        reuse_prefixes=False,
    )
    for index in range(max_sequences):
        run.scheduler.submit(request(str(index), 30, max_new_tokens=30))
    steps = [run.step() for _ in range(10)]
    assert len(run.scheduler.running) == max_sequences
    assert max(step.num_tokens for step in steps) == max_tokens_per_step
    while run.scheduler.has_work:
        run.step()
    assert not any(sequence.num_preemptions for sequence in run.finished)


def test_nobody_is_let_in_while_a_chunk_holds_all_pages_of_a_window() -> None:
    groups = (PageGroup("full", None, 99), PageGroup("window", 2, 6))
    run = engine(*groups, max_tokens_per_step=40, max_sequences=3, prefill_chunk=24)
    run.scheduler.submit(request("old", 50))
    run.scheduler.submit(request("young", 4))
    assert chunks(run.step()) == [("old", 0, 24)]
    assert chunks(run.step()) == [("old", 24, 20)], "of six pages one holds what the window reads"
    assert chunks(run.step()) == [("old", 44, 6)]
    assert chunks(run.step()) == [("old", 50, 1), ("young", 0, 4)]


def test_pages_of_sequences_that_grow_side_by_side_lie_in_rows() -> None:
    run = engine(PageGroup("full", None, 40), max_sequences=4, prefill_chunk=5)
    for index, num_prompt in enumerate((11, 3, 17, 8)):
        run.scheduler.submit(request(str(index), num_prompt, max_new_tokens=20))
    while run.scheduler.has_work:
        for chunk in run.step().chunks:
            pages = chunk.tables["full"].pages
            assert pages == tuple(range(pages[0], pages[0] + len(pages)))


def test_cancelled_while_its_step_runs() -> None:
    run = engine(max_sequences=4)
    run.scheduler.submit(request("a", 5, num_samples=2))
    run.scheduler.submit(request("b", 5))
    found = []
    run.step(meanwhile=lambda: found.extend(run.scheduler.cancel("a")))
    assert [s.finish_reason for s in found] == [FinishReason.CANCELLED]
    assert [s.request.request_id for s in run.scheduler.running] == ["b"]
    assert run.scheduler.cancel("a") == run.scheduler.cancel("unknown") == []
    while run.scheduler.has_work:
        run.step()
    assert [s.request.request_id for s in run.finished] == ["b"]
    assert run.scheduler.pages.num_free_pages() == {"full": 16}


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (Request("a", (), 4), "the prompt is empty"),
        (request("a", 4, max_new_tokens=0), "max_new_tokens is 0"),
        (
            request("a", 4, num_samples=5),
            r"5 samples of one prompt, where 1 to 4 \(max_sequences\)",
        ),
        (request("a", 4, num_samples=0), "0 samples"),
        (request("a", 60, 5), "60 tokens of prompt and 5 new ones are 65, more than .* of 64"),
        (request("a", 40, 10), r"49 tokens to cache do not fit .* 4 tokens a page .*'full' 12"),
        (request("there", 4), "'there' is there already"),
    ],
)
def test_what_can_never_be_answered_is_refused_with_its_numbers(asked: Request, what: str) -> None:
    run = engine(PageGroup("full", None, 12), PageGroup("w", 4, 2), max_sequences=4)
    run.scheduler.submit(request("there", 40, 9))
    with pytest.raises(BadInputError, match=what):
        run.scheduler.submit(asked)
    while run.scheduler.has_work:
        run.step()
    assert [s.request.request_id for s in run.finished] == ["there"]


@pytest.mark.parametrize(
    "options", [{"max_context": 0}, {"prefill_chunk": 0}, {"max_sequences": 0}]
)
def test_limits_under_which_nothing_moves_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(BadInputError, match="is 0"):
        SchedulerOptions(**{"max_context": 8, **options})


def test_a_step_must_hold_a_token_of_every_running_sequence() -> None:
    with pytest.raises(BadInputError, match="max_tokens_per_step 8 is below max_sequences 9"):
        SchedulerOptions(64, max_sequences=9, max_tokens_per_step=8)
