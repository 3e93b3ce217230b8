"""Engines over tiny random models, for tests: float32, so that tokens are exact."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from support.small_jobs import VOCAB_SIZE, make_text
from support.tiny_models import CONFIGS, build_model
from transformers import PreTrainedTokenizerFast

from llmopt.decoding import Engine
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.demo.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, train_tokenizer

CONTEXT = 256


@cache
def _model(family: str) -> Any:
    return build_model(CONFIGS[family](vocab_size=VOCAB_SIZE))


def tiny_model(family: str = "llama") -> Any:
    """A random model of ``VOCAB_SIZE`` tokens and a context of ``CONTEXT``, always the same one."""
    return _model(family)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of as many tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer([make_text(20, seed=9)], VOCAB_SIZE),
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_engine(family: str = "llama", **options: Any) -> Engine:
    """An engine over :func:`tiny_model` with pages of 16 tokens."""
    defaults: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "num_pages": 64}
    defaults["kv_cache"] = KVCacheConfig(page_size=16)
    return Engine(tiny_model(family), **{**defaults, **options})


def random_prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]


def transformers_tokens(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens by ``model.generate``."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
