"""llmopt's engine, as the benchmark runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import llama_config, write_checkpoint

from llmopt.bench.runners import decode_llmopt, decode_transformers

PROMPTS = [[5, 9, 3], [11, 2, 7, 8, 40, 1, 96, 12, 3], [60]]
NEW_TOKENS = [6, 4, 9]


@pytest.mark.parametrize("kv", ["16-bit", "int8", "int4"])
def test_every_token_has_its_moment_and_plain_caches_give_transformers_tokens(
    tmp_path: Path, kv: str
) -> None:
    write_checkpoint(tmp_path, llama_config())
    request = {
        "model": str(tmp_path),
        "is_packed": False,
        "kv": kv,
        "variant": "dynamic",
        "dtype": "float32",
        "device": "cpu",
        "max_context": 32,
        "max_sequences": 2,  # fewer than requests: one waits
    }
    engine = decode_llmopt.open_engine(request)
    for _ in range(2):
        tokens, times = engine.run(PROMPTS, NEW_TOKENS)
        assert [len(row) for row in tokens] == NEW_TOKENS
        assert [len(row) for row in times] == NEW_TOKENS
        assert all(row == sorted(row) and row[0] > 0 for row in times)
        assert times[2][0] >= min(times[0][-1], times[1][-1])
    if kv == "16-bit":
        wanted, _ = decode_transformers.open_engine(request).run(PROMPTS, NEW_TOKENS)
        assert tokens == wanted
