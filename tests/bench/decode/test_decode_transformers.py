"""transformers' ways to decode, as the benchmark runs them: the same tokens, a moment for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, llama_config, write_checkpoint

from llmopt.bench.runners.decode_transformers import open_engine

PROMPTS = [[5, 9, 3], [11, 2, 7, 8, 40, 1, 96, 12, 3], [60]]
NEW_TOKENS = [6, 4, 9]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, llama_config())

    def make(variant: str) -> Any:
        return open_engine(
            {
                "model": str(folder),
                "is_packed": False,
                "variant": variant,
                "dtype": "float32",
                "device": "cpu",
                "max_context": 32,
                "max_sequences": 4,
            }
        )

    return make


@pytest.fixture(scope="module")
def wanted(engine: Callable[[str], Any]) -> list[list[int]]:
    """Greedy tokens by whole forwards, without any cache."""
    model = engine("dynamic").model
    rows = []
    for prompt, limit in zip(PROMPTS, NEW_TOKENS, strict=True):
        ids = list(prompt)
        for _ in range(limit):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(ids[len(prompt) :])
    return rows


@pytest.mark.parametrize("variant", ["dynamic", "static", "sequential", "continuous"])
def test_every_way_gives_the_same_tokens_and_when_each_came(
    engine: Callable[[str], Any], wanted: list[list[int]], variant: str
) -> None:
    made = engine(variant)
    for _ in range(2):  # a second run starts a clock of its own
        tokens, times = made.run(PROMPTS, NEW_TOKENS)
        assert tokens == wanted
        assert [len(request) for request in times] == NEW_TOKENS
        assert all(request == sorted(request) and request[0] > 0 for request in times)
    if variant == "sequential":
        assert times[0][-1] < times[1][0]
    if variant == "dynamic":
        assert times[0] == times[2][:6]


def test_gaps_are_leads_of_the_best_logit(
    engine: Callable[[str], Any], wanted: list[list[int]]
) -> None:
    made = engine("dynamic")
    gaps = made.gaps(PROMPTS, wanted)
    assert [len(row) for row in gaps] == NEW_TOKENS
    ids = torch.tensor([[*PROMPTS[1], *wanted[1][:2]]])
    with torch.inference_mode():
        logits = made.model(ids).logits[0, -1]
    assert int(logits.argmax()) == wanted[1][2]
    best = logits.topk(2).values
    assert gaps[1][2] == pytest.approx(float(best[0] - best[1]), abs=1e-4)
    assert logits.numel() == VOCABULARY


def test_noise_is_twice_what_another_batch_shape_does_to_a_logit(
    engine: Callable[[str], Any], wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine("dynamic")
    assert 0 <= made.noise(PROMPTS, wanted) < 1e-4  # of float32
    whole = made._whole(PROMPTS[1], wanted[1])
    torch.testing.assert_close(made._stepwise(PROMPTS[1], wanted[1]), whole, rtol=0, atol=1e-5)
    stepwise = made._stepwise

    def moved(prompt: list[int], row: list[int]) -> torch.Tensor:
        logits = stepwise(prompt, row)
        if prompt == PROMPTS[1]:
            logits[2, 7] -= 0.25
        return logits

    monkeypatch.setattr(made, "_stepwise", moved)
    assert made.noise(PROMPTS, wanted) == pytest.approx(0.5, abs=1e-4)
