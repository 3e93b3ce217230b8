"""llmopt's engine, as the benchmark runs it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_models import llama_config, write_checkpoint

from llmopt.bench.runners import decode_llmopt, decode_transformers
from llmopt.decoding.stored_cache import choose_cache
from llmopt.formats.kv_cache import CONFIG_KEY, own_section
from llmopt.kv_cache.settings import KVCacheSettings

REQUEST = {
    "is_packed": False,
    "kv": "16-bit",
    "variant": "dynamic",
    "dtype": "float32",
    "device": "cpu",
    "max_context": 32,
    "max_sequences": 2,  # fewer than requests: one waits
}
PROMPTS = [[5, 9, 3], [11, 2, 7, 8, 40, 1, 96, 12, 3], [60]]
NEW_TOKENS = [6, 4, 9]


@pytest.mark.parametrize("kv", ["16-bit", "int8", "int4"])
def test_every_token_has_its_moment_and_plain_caches_give_transformers_tokens(
    tmp_path: Path, kv: str
) -> None:
    write_checkpoint(tmp_path, llama_config())
    request = {**REQUEST, "model": str(tmp_path), "kv": kv}
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


@pytest.mark.parametrize(
    ("kv", "dtype", "kind"),
    [
        ("16-bit", "bfloat16", "bf16"),
        ("16-bit", "float16", "fp16"),
        ("16-bit", "float32", "fp32"),
        ("int4", "float32", "int4"),
    ],
)
def test_rows_say_which_cache_it_was_whatever_the_checkpoint_was_judged_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str, dtype: str, kind: str
) -> None:
    write_checkpoint(tmp_path, llama_config())
    config = json.loads((tmp_path / "config.json").read_text())
    config[CONFIG_KEY] = own_section(KVCacheSettings("int8"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert choose_cache("auto", tmp_path).kind == "int8"
    asked = {}

    def engine(model: str, **options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(notes=())

    monkeypatch.setattr(decode_llmopt, "Engine", engine)
    request = {"model": str(tmp_path), "kv": kv, "dtype": dtype, "device": "cpu"}
    decode_llmopt.open_engine({**request, "max_context": 32, "max_sequences": 2})
    assert choose_cache(asked["kv_cache"], tmp_path).kind == kind


def test_readers_learn_what_the_engine_has_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, llama_config())
    monkeypatch.setattr("llmopt.decoding.Engine.notes", ("without CUDA graphs",))
    engine = decode_llmopt.open_engine({**REQUEST, "model": str(tmp_path)})
    assert engine.notes == ["without CUDA graphs"]
