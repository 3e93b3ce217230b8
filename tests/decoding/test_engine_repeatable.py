"""A request's tokens depend on its prompt, options and seed, not on what else goes on."""

from __future__ import annotations

from typing import Any

import pytest
from support.engines import random_prompts, tiny_engine

from llmopt.decoding import Completion, Engine
from llmopt.decoding.kv_cache_config import KVCacheConfig

PROMPTS = random_prompts(6, longest=70, seed=3)
DRAWN: dict[str, Any] = {
    "max_new_tokens": 18, "temperature": 1.1, "top_p": 0.97, "top_k": 300, "min_p": 1e-4,
    "repetition_penalty": 1.1, "seed": 12345, "ignore_eos": True,
}  # fmt: skip


def tokens(answers: list[Completion]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each request by itself in an engine that has seen none."""
    return [tokens(tiny_engine().generate(prompt, **DRAWN))[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"prefill_chunk": 1},
        {"prefill_chunk": 7, "max_tokens_per_step": 16},
        {"max_sequences": 2},
        {"kv_cache": KVCacheConfig(page_size=32)},
    ],
)
def test_in_a_batch_with_other_chunks_and_limits(
    limits: dict[str, Any], alone: list[list[int]]
) -> None:
    assert tokens(tiny_engine(**limits).generate(PROMPTS, **DRAWN)) == alone


def test_after_preemption() -> None:
    prompts = random_prompts(4, longest=12, seed=8)
    options = {**DRAWN, "max_new_tokens": 40}
    expected = tokens(tiny_engine().generate(prompts, **options))
    engine = tiny_engine(num_pages=8)
    answers = engine.generate(prompts, **options)
    assert sum(answer.num_preemptions for answer in answers) > 0
    assert tokens(answers) == expected
    assert engine.num_free_pages == {"full": 8}


def test_from_a_prefix_in_the_cache(alone: list[list[int]]) -> None:
    engine = tiny_engine()
    engine.generate(PROMPTS, **DRAWN)
    again = engine.generate(PROMPTS, **DRAWN)
    assert sum(answer.num_reused_tokens for answer in again) > 60
    assert tokens(again) == alone


def test_beside_neighbours_with_other_options(alone: list[list[int]]) -> None:
    engine = tiny_engine()
    mine = [engine.submit(prompt, **DRAWN) for prompt in PROMPTS[::2]]
    for index, prompt in enumerate(PROMPTS[1::2]):
        engine.submit(prompt, max_new_tokens=5 + index, temperature=0.5 * index, seed=index)
    answers = run_all(engine)
    assert [answers[request_id].token_ids for request_id in mine] == alone[::2]


def test_another_seed_gives_other_tokens(alone: list[list[int]]) -> None:
    other = tiny_engine().generate(PROMPTS, **{**DRAWN, "seed": 12346})
    assert not any(one == two for one, two in zip(tokens(other), alone, strict=True))


def run_all(engine: Engine) -> dict[str, Completion]:
    """Step until nothing is left; the answers by request."""
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    return {d.request_id: d.completion for d in deltas if d.completion is not None}
