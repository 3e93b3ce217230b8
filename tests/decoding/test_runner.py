"""The packed forward over the paged cache says what transformers' own forward says."""

import pytest
import torch
from decoding.stepping import greedy
from support.tiny_models import CONFIGS, build_model

from llmopt.decoding.kv.layout import PoolLimits
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.runner import Runner

PROMPTS = [[5, 9, 11], list(range(20, 61)), [7] * 18 + [3, 4], [42]]
NEW_TOKENS = 12


def generated(model, prompts, num_tokens):
    """Greedy tokens by transformers, prompt by prompt, and their logits."""
    tokens, logits = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append([row[0] for row in out.logits])
    return tokens, logits


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(family):
    model = build_model(CONFIGS[family]())
    expected, expected_logits = generated(model, PROMPTS, NEW_TOKENS)
    ways = [
        {"chunk": 64},
        {"chunk": 7, "shuffled": True},
        {"chunk": 1, "together": False},
        {"chunk": 64, "page_size": 32, "shuffled": True},
    ]
    for way in ways:
        page_size = way.setdefault("page_size", 16)
        config = KVCacheConfig(page_size=page_size)
        runner = Runner(model, config, PoolLimits(num_pages=40))
        tokens, logits, _ = greedy(runner, PROMPTS, NEW_TOKENS, **way)
        assert tokens == expected, way
        for got, want in zip(logits, expected_logits, strict=True):
            torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-4)
