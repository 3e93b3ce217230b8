"""Streams, threads, cancellation, and five hundred requests at random."""

from __future__ import annotations

import asyncio
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engines import random_prompts, tiny_engine

from llmopt.decoding import Completion, Engine
from llmopt.decoding.completion import Delta
from llmopt.decoding.sampling.parameters import parse_options
from llmopt.decoding.tracking import Collected, Posted
from llmopt.errors import BadInputError

PROMPTS = random_prompts(5, longest=30, seed=2)
OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "ignore_eos": True}
ALL_FREE = {"full": 64}


@pytest.fixture
def engine() -> Engine:
    return tiny_engine()


async def text_of(engine: Engine, prompt: Any, **options: Any) -> str:
    return "".join([delta.text async for delta in engine.stream(prompt, **options)])


def wait_for_the_driver(engine: Engine) -> None:
    """The thread ends by itself when the last stream has."""
    driver = engine._driver
    if driver is not None:
        driver.join(timeout=60)
    assert engine._driver is None


def test_streams_run_together_and_say_what_generate_says(engine: Engine) -> None:
    async def run() -> list[str]:
        return await asyncio.gather(*(text_of(engine, prompt, **OPTIONS) for prompt in PROMPTS))

    texts = asyncio.run(run())
    wait_for_the_driver(engine)
    assert texts == [answer.text for answer in engine.generate(PROMPTS, **OPTIONS)]
    assert engine.num_free_pages == ALL_FREE


def test_the_deltas_of_a_stream_end_with_the_completion(engine: Engine) -> None:
    async def run() -> list[Delta]:
        return [delta async for delta in engine.stream(PROMPTS[0], **OPTIONS, n=2)]

    deltas = asyncio.run(run())
    assert [len(delta.token_ids) for delta in deltas] == [1] * 20
    ends = [delta.completion for delta in deltas if delta.completion is not None]
    assert sorted(end.sample_index for end in ends) == [0, 1] and deltas[-1].completion is ends[-1]


def test_closing_a_stream_cancels_it_and_the_others_go_on(engine: Engine) -> None:
    async def run() -> str:
        other = asyncio.create_task(text_of(engine, PROMPTS[1], **OPTIONS))
        leaving = engine.stream(PROMPTS[0], max_new_tokens=200, ignore_eos=True)
        async for _ in leaving:
            break
        await leaving.aclose()
        return await other

    text = asyncio.run(run())
    wait_for_the_driver(engine)
    assert text == engine.generate(PROMPTS[1], **OPTIONS)[0].text
    assert not engine.has_work and engine.num_free_pages == ALL_FREE


def test_a_cancelled_task_gives_its_pages_back(engine: Engine) -> None:
    async def run() -> None:
        task = asyncio.create_task(text_of(engine, PROMPTS[0], max_new_tokens=200, ignore_eos=True))
        while not engine.has_work:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert not engine.has_work and engine.num_free_pages == ALL_FREE


def test_a_stream_refuses_what_generate_refuses(engine: Engine) -> None:
    with pytest.raises(BadInputError, match="the prompt is empty"):
        asyncio.run(text_of(engine, ""))
    assert not engine.has_work


def test_a_step_that_fails_is_raised_in_every_stream(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: object) -> None:
        raise RuntimeError("out of memory")

    async def run() -> list[str | BaseException]:
        streams = (text_of(engine, prompt, **OPTIONS) for prompt in PROMPTS)
        return await asyncio.gather(*streams, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", fail)
        assert [repr(one) for one in asyncio.run(run())] == ["RuntimeError('out of memory')"] * 5
        wait_for_the_driver(engine)
    assert not engine.has_work and engine.num_free_pages == ALL_FREE
    assert asyncio.run(text_of(engine, PROMPTS[0], **OPTIONS))


def test_what_nobody_can_read_any_more_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    inbox = Posted(loop)
    loop.close()
    inbox.fail(RuntimeError("late"))


def test_nothing_is_lost_of_what_others_computed_meanwhile(engine: Engine) -> None:
    (expected,) = engine.generate(PROMPTS[0], **OPTIONS)
    deltas = engine.iterate(PROMPTS[0], **OPTIONS)
    found = [next(deltas)]
    engine.generate(PROMPTS[1], max_new_tokens=30, ignore_eos=True)  # to the end of both
    assert not engine.has_work
    found += deltas
    assert [token for delta in found for token in delta.token_ids] == expected.token_ids
    assert found[-1].completion is not None
    assert found[-1].completion.token_ids == expected.token_ids


def test_an_inbox_is_emptied_under_the_lock_that_it_is_filled_under(engine: Engine) -> None:
    """Else a delta may be put into the list that was taken already."""
    thread = threading.Thread(target=engine._take, args=(Collected(),))
    with engine._state:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


def test_a_loop_that_closes_meanwhile_ends_nobody_else(engine: Engine) -> None:
    class Closing(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *args: Any, **options: Any) -> Any:
            self.close()
            return super().call_soon_threadsafe(*args, **options)

    (expected,) = engine.generate(PROMPTS[0], **OPTIONS)
    engine._enter([PROMPTS[1]], parse_options(OPTIONS), Posted(Closing()))
    assert engine.generate(PROMPTS[0], **OPTIONS)[0].token_ids == expected.token_ids


def test_what_ends_a_thread_ends_no_later_stream(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(step: object) -> None:
        raise SystemExit(3)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", leave)
        with pytest.raises(SystemExit):
            asyncio.run(text_of(engine, PROMPTS[0], **OPTIONS))
    later = text_of(engine, PROMPTS[0], **OPTIONS)
    (expected,) = engine.generate(PROMPTS[0], **OPTIONS)
    assert asyncio.run(asyncio.wait_for(later, 30)) == expected.text


def test_threads_may_generate_at_the_same_time(engine: Engine) -> None:
    expected = [answer.token_ids for answer in engine.generate(PROMPTS, **OPTIONS)]
    found: dict[int, list[int]] = {}

    def run(index: int) -> None:
        found[index] = engine.generate(PROMPTS[index], **OPTIONS)[0].token_ids

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(PROMPTS))] == expected
    assert engine.num_free_pages == ALL_FREE


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_cancelling_before_within_and_after_the_prompt(engine: Engine, num_steps: int) -> None:
    engine = tiny_engine(prefill_chunk=8)
    (whole,) = engine.generate([7] * 20, max_new_tokens=30, ignore_eos=True)
    engine = tiny_engine(prefill_chunk=8)
    request_id = engine.submit([7] * 20, max_new_tokens=30, ignore_eos=True)
    deltas = [delta for _ in range(num_steps) for delta in engine.step()]
    assert engine.cancel(request_id) and not engine.cancel(request_id)
    assert engine.num_free_pages == ALL_FREE
    deltas += engine.step()
    answer = deltas[-1].completion
    assert answer is not None and answer.finish_reason == "cancelled"
    assert answer.token_ids == whole.token_ids[: max(0, num_steps - 2)]
    assert "".join(delta.text for delta in deltas) == answer.text
    assert not engine.has_work and not engine.cancel("unknown")


def test_cancelling_while_a_forward_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages may be given out again, but not before that forward is over."""
    expected = engine.generate(PROMPTS[1], **OPTIONS)[0].token_ids
    victim = engine.submit(PROMPTS[0], max_new_tokens=99, ignore_eos=True)
    stays = engine.submit(PROMPTS[1], **OPTIONS)
    run, num_runs = engine._runner.run, 0

    def cancel_meanwhile(step: Any) -> Any:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 3:
            assert engine.cancel(victim)
        return run(step)

    monkeypatch.setattr(engine._runner, "run", cancel_meanwhile)
    answers = finish(engine, [])
    assert answers[victim].finish_reason == "cancelled" and len(answers[victim].token_ids) == 2
    assert answers[stays].token_ids == expected
    assert engine.num_free_pages == ALL_FREE


def test_a_gpu_is_waited_for_where_others_may_come_and_go(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward is queued only; a test of the order, as there is no GPU here."""
    events: list[object] = []

    def synchronize(device: object) -> None:
        thread = threading.Thread(target=lambda: engine.submit(PROMPTS[1], **OPTIONS))
        thread.start()
        thread.join(30)
        events.append((device, thread.is_alive()))

    logits = SimpleNamespace(is_cuda=True, device="cuda:1")
    monkeypatch.setattr(engine._runner, "run", lambda step: logits)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(engine, "_sample", lambda step, logits: events.append("sampled"))
    engine.submit(PROMPTS[0], **OPTIONS)
    engine._advance()
    assert events == [("cuda:1", False), "sampled"]
    assert len(engine._tracked) == 2


def test_five_hundred_requests_with_random_lengths_options_and_cancellations() -> None:
    """Every one is answered, cancelled or refused, and every page comes back."""
    engine = tiny_engine(max_sequences=32, num_pages=24, max_context=40, max_tokens_per_step=256)
    choose = random.Random(6)
    alive: list[str] = []
    refused, cancelled, deltas = 0, set(), []
    for index, prompt in enumerate(random_prompts(500, longest=45, seed=6)):
        options: dict[str, Any] = {
            "max_new_tokens": choose.randint(1, 4),
            "temperature": choose.choice([0.0, 0.8]),
            "seed": index,
            "n": choose.choice([1, 1, 1, 2]),
            "stop": choose.choice([None, "a"]),
        }
        if len(prompt) + options["max_new_tokens"] > 40:
            with pytest.raises(BadInputError, match="context of 40"):
                engine.submit(prompt, **options)
            refused += 1
        else:
            alive.append(engine.submit(prompt, **options))
        while choose.random() < 0.1:
            deltas += engine.step()
        if choose.random() < 0.4:
            victim = choose.choice(alive[-25:])
            if engine.cancel(victim):
                cancelled.add(victim)
    answers = finish(engine, deltas)
    assert refused > 40 and len(cancelled) > 80 and len(alive) == 500 - refused
    assert set(answers) == set(alive)
    for request_id, answer in answers.items():
        assert (answer.finish_reason == "cancelled") == (request_id in cancelled)
        assert answer.token_ids or request_id in cancelled
    assert engine.num_free_pages == {"full": 24} and not engine._tracked


def finish(engine: Engine, deltas: list[Delta]) -> dict[str, Completion]:
    """Step until nothing is left; the last answer of each request."""
    while engine.has_work:
        deltas += engine.step()
    deltas += engine.step()
    return {d.request_id: d.completion for d in deltas if d.completion is not None}
