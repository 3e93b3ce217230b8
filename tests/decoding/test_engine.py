"""Prompts in, answers out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.engines import (
    random_prompts,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
    transformers_tokens,
)
from support.tiny_models import CONFIGS, build_model

from llmopt.decoding import Engine
from llmopt.decoding.runner import Runner

PROMPTS = random_prompts(6)
FULL = {"full": 64}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])  # all: test_runner.py
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    engine = tiny_engine(family, prefill_chunk=24)
    answers = engine.generate(PROMPTS, max_new_tokens=16)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.token_ids == transformers_tokens(tiny_model(family), prompt, 16)
        assert answer.prompt_token_ids == prompt


def test_an_answer_has_text_logprobs_and_a_reason(engine: Engine) -> None:
    (answer,) = engine.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True, logprobs=2)
    assert len(answer.token_ids) == 12 and answer.finish_reason == "length"
    whole = tiny_tokenizer().decode(PROMPTS[0] + answer.token_ids, skip_special_tokens=True)
    before = tiny_tokenizer().decode(PROMPTS[0], skip_special_tokens=True).rstrip("\ufffd")
    assert before + answer.text == whole
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([PROMPTS[0] + answer.token_ids])).logits[0]
    expected = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    rows = torch.arange(12)
    torch.testing.assert_close(
        torch.tensor(answer.logprobs), expected[rows, answer.token_ids], rtol=1e-4, atol=1e-4
    )
    assert [[token for token, _ in best] for best in answer.top_logprobs] == (
        expected.topk(2).indices.tolist()
    )


def test_a_text_is_encoded_as_the_tokenizer_does(engine: Engine) -> None:
    text = "kato mire suno"
    ids = tiny_tokenizer()(text)["input_ids"]
    by_text, by_ids, by_tensor = engine.generate([text, ids, torch.tensor(ids)], max_new_tokens=6)
    assert by_text.token_ids == by_ids.token_ids == by_tensor.token_ids
    assert engine.generate(text, max_new_tokens=6)[0].token_ids == by_ids.token_ids
    assert engine.generate(ids, max_new_tokens=6)[0].token_ids == by_ids.token_ids


def test_notes_tell_why_no_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's attention, whose torch references run here, as an engine on a GPU has it."""
    with monkeypatch.context() as patch:
        by_kernels = functools.partial(Runner, backend="kernels")
        patch.setattr("llmopt.decoding.engine.Runner", by_kernels)
        engines = [
            Engine(build_model(CONFIGS[family](head_dim=64)).bfloat16(), num_pages=4)
            for family in ("llama", "mixtral")
        ]
    notes = [one.notes for one in engines]
    assert notes[0] == () and len(notes[1]) == 1
    assert "CUDA graphs" in notes[1][0] and "which experts a step needs" in notes[1][0]


@pytest.mark.parametrize("where", ["config", "generation_config"])
@pytest.mark.parametrize("as_list", [False, True])
def test_end_of_sequence_ends_the_answer_whichever_config_names_it(
    where: str, as_list: bool
) -> None:
    model = tiny_model()
    plain = Engine(model, num_pages=8).generate(PROMPTS[1], max_new_tokens=12, ignore_eos=True)
    end = plain[0].token_ids[5]
    first = plain[0].token_ids.index(end)
    before = model.config.eos_token_id, model.generation_config.eos_token_id
    try:
        config = getattr(model, where)
        config.eos_token_id = [500, end] if as_list else end
        engine = Engine(model, num_pages=8, tokenizer=tiny_tokenizer())
        (answer,) = engine.generate(PROMPTS[1], max_new_tokens=12)
        (ignoring,) = engine.generate(PROMPTS[1], max_new_tokens=12, ignore_eos=True)
    finally:
        model.config.eos_token_id, model.generation_config.eos_token_id = before
    assert answer.token_ids == plain[0].token_ids[: first + 1]
    assert answer.finish_reason == "stop"
    assert ignoring.token_ids == plain[0].token_ids
    assert tiny_tokenizer().decode(answer.token_ids[:-1]).endswith(answer.text)


def test_a_stop_string_ends_the_answer_and_is_not_shown(engine: Engine) -> None:
    (plain,) = engine.generate(PROMPTS[2], max_new_tokens=40, ignore_eos=True)
    assert plain.text is not None
    stop = plain.text[10:13]
    (answer,) = engine.generate(
        PROMPTS[2], max_new_tokens=40, ignore_eos=True, stop=[stop, "never said"]
    )
    assert answer.text == plain.text[: plain.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == plain.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < 40


def test_what_was_held_back_for_a_stop_string_is_shown_at_the_end(engine: Engine) -> None:
    (plain,) = engine.generate(PROMPTS[2], max_new_tokens=9, ignore_eos=True)
    assert plain.text is not None
    (answer,) = engine.generate(
        PROMPTS[2], max_new_tokens=9, ignore_eos=True, stop=plain.text[-2:] + "\x00"
    )
    assert answer.text == plain.text and answer.finish_reason == "length"


def test_many_more_prompts_than_run_at_a_time_come_back_in_order() -> None:
    engine = tiny_engine(max_sequences=3, num_pages=16)
    prompts = random_prompts(20, longest=30, seed=5)
    answers = engine.generate(prompts, max_new_tokens=7, ignore_eos=True)
    assert [answer.prompt_token_ids for answer in answers] == prompts
    for prompt, answer in zip(prompts[::6], answers[::6], strict=True):
        (alone,) = engine.generate(prompt, max_new_tokens=7, ignore_eos=True)
        assert alone.token_ids == answer.token_ids
    assert engine.num_free_pages == {"full": 16} and not engine.has_work


def test_several_answers_to_a_prompt_differ_and_share_its_computation(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 2.0, "seed": 4, "n": 3}
    answers = engine.generate(PROMPTS[:2], **options)
    assert [answer.sample_index for answer in answers] == [0, 1, 2] * 2
    assert [answer.prompt_token_ids for answer in answers[::3]] == PROMPTS[:2]
    assert len({tuple(answer.token_ids) for answer in answers}) == 6
    (first,) = engine.generate(PROMPTS[1], **{**options, "n": 1})
    assert first.token_ids == answers[3].token_ids
    assert engine.num_free_pages == FULL


def test_without_a_seed_answers_differ_and_say_with_which_they_come_again(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 3.0}
    first, second = (engine.generate(PROMPTS[0], **options)[0] for _ in range(2))
    assert first.seed != second.seed and first.token_ids != second.token_ids
    (again,) = engine.generate(PROMPTS[0], **options, seed=first.seed)
    assert again.token_ids == first.token_ids


def test_the_answer_ends_with_the_context_unless_told_otherwise() -> None:
    engine = tiny_engine(max_context=40)
    (answer,) = engine.generate([7] * 30, ignore_eos=True)
    assert len(answer.token_ids) == 10 and answer.finish_reason == "length"


def test_steps_give_what_generate_gives(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True}
    ids = [engine.submit(prompt, **options) for prompt in PROMPTS[:3]]
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert engine.step() == []
    for request_id, expected in zip(ids, engine.generate(PROMPTS[:3], **options), strict=True):
        mine = [delta for delta in deltas if delta.request_id == request_id]
        assert "".join(delta.text for delta in mine) == expected.text
        assert [token for delta in mine for token in delta.token_ids] == expected.token_ids
        assert [value for delta in mine for value in delta.logprobs] == pytest.approx(
            expected.logprobs, abs=1e-4
        )
        assert [delta.finish_reason for delta in mine] == [None] * 8 + ["length"]
        assert mine[-1].completion is not None and mine[-1].completion.text == expected.text


def test_iterating_gives_the_same_text_and_closing_gives_the_pages_back(engine: Engine) -> None:
    (expected,) = engine.generate(PROMPTS[0], max_new_tokens=20, ignore_eos=True)
    pieces = [d.text for d in engine.iterate(PROMPTS[0], max_new_tokens=20, ignore_eos=True)]
    assert "".join(pieces) == expected.text and len(pieces) == 20
    running = engine.iterate(PROMPTS[0], max_new_tokens=20, ignore_eos=True)
    next(running)
    assert engine.num_free_pages != FULL
    running.close()
    assert engine.num_free_pages == FULL and not engine.has_work


def test_a_prompt_seen_before_is_taken_from_the_cache(engine: Engine) -> None:
    prompt = random_prompts(1, longest=200, seed=77)[0] + [9] * 50
    first, second = (engine.generate(prompt, max_new_tokens=4)[0] for _ in range(2))
    assert second.token_ids == first.token_ids
    assert first.num_reused_tokens == 0 and second.num_reused_tokens >= 48


def test_the_model_may_be_used_otherwise_meanwhile(engine: Engine) -> None:
    before = tiny_model()(torch.tensor([PROMPTS[0]])).logits
    engine.generate(PROMPTS[0], max_new_tokens=2)
    assert torch.equal(tiny_model()(torch.tensor([PROMPTS[0]])).logits, before)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8", "int4"])
def test_every_kind_of_cache_answers_and_gives_its_pages_back(kind: str) -> None:
    engine = Engine(tiny_model("gemma2"), kv_cache=kind, num_pages=10)
    before = engine.num_free_pages
    prompts = [[5] * 190, [6] * 20]  # beyond the window of int4, and within it
    answers = engine.generate(prompts, max_new_tokens=8, ignore_eos=True)
    assert [len(answer.token_ids) for answer in answers] == [8, 8]
    assert [answer.text for answer in answers] == [None, None]
    assert engine.num_free_pages == before
