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
