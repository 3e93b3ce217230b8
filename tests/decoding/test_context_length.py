"""How long a context is taken, and that longrope's factors never go by a neighbour."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.engines import random_prompts, transformers_tokens
from support.tiny_models import VOCABULARY, build_model, phi3_config

from llmopt.decoding import Engine
from llmopt.decoding.context_length import choose_context
from llmopt.errors import BadInputError

ORIGINAL, CONTEXT = 32, 128


def longrope_parameters(**changes: Any) -> dict[str, Any]:
    values = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5],
        "long_factor": [30.0, 50.0],
        "original_max_position_embeddings": ORIGINAL,
    }
    return {**values, **changes}


def longrope_model() -> Any:
    return build_model(
        phi3_config(
            rope_parameters=longrope_parameters(),
            original_max_position_embeddings=ORIGINAL,
            max_position_embeddings=CONTEXT,
            sliding_window=None,
        )
    )


def test_longrope_is_served_up_to_where_its_factors_change() -> None:
    model = longrope_model()
    engine = Engine(model, max_context=ORIGINAL, num_pages=32)
    prompts = [[t % VOCABULARY for t in p] for p in random_prompts(4, longest=12, seed=3)]
    prompts.append([5 + i for i in range(20)])  # to the last position that there may be
    answers = engine.generate(prompts, max_new_tokens=ORIGINAL - 20, ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = transformers_tokens(model, prompt, ORIGINAL - 20)
        assert answer.token_ids[: len(expected)] == expected  # transformers ends at eos


@pytest.mark.parametrize("asked", [None, ORIGINAL + 1])
def test_longrope_is_refused_where_a_neighbour_would_change_the_factors(asked: int | None) -> None:
    with pytest.raises(BadInputError) as caught:
        Engine(longrope_model(), max_context=asked, num_pages=32)
    assert f"more than {ORIGINAL}" in caught.value.what
    assert f"max_context={ORIGINAL}" in caught.value.remedy


def test_rotary_parameters_may_be_by_type_of_layer() -> None:
    config = SimpleNamespace(
        max_position_embeddings=CONTEXT,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": longrope_parameters(),
        },
    )
    assert choose_context(ORIGINAL, config) == ORIGINAL
    with pytest.raises(BadInputError, match="longrope"):
        choose_context(None, config)


def test_a_config_that_says_nothing_needs_a_number() -> None:
    assert choose_context(7, SimpleNamespace()) == 7
    with pytest.raises(BadInputError, match="does not say"):
        choose_context(None, SimpleNamespace())


def test_the_danger_is_real() -> None:
    """transformers' answers change past the original length: the refusal is not for nothing."""
    import torch

    model = longrope_model()
    ids = torch.arange(5, 15)[None]
    near, far = (torch.tensor([[*range(9), last]]) for last in (9, ORIGINAL))
    with torch.no_grad():
        rows = [model(ids, position_ids=place).logits[0, 5] for place in (near, far)]
    assert float((rows[0] - rows[1]).abs().max()) > 1e-3
