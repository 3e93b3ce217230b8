"""The cache that a checkpoint was judged with is what the engine takes, and what the gate saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from decoding.stepping import greedy
from support.tiny_models import CONFIGS, VOCABULARY, write_checkpoint

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.decoding.kv.layout import PoolLimits
from llmopt.decoding.kv_cache_config import HeadScales, KVCacheConfig
from llmopt.decoding.runner import Runner
from llmopt.decoding.stored_cache import choose_cache
from llmopt.formats.kv_cache import CONFIG_KEY, own_section
from llmopt.kv_cache.reading import KVCache, LayerScales
from llmopt.kv_cache.settings import KVCacheSettings
from llmopt.loading import load_dense
from llmopt.scoring import WalkerScorer

PROMPT = [int(i) for i in torch.randint(VOCABULARY - 3, (61,), generator=torch.Generator())]
NEW_TOKENS = 20
SCALES = (LayerScales(0.02, 0.03), LayerScales(0.001, 0.01), LayerScales(0.05, 0.002))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_the_gate_reads_the_cache_that_the_engine_keeps(
    family: str, kind: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "model", CONFIGS[family](), dtype=torch.float32)
    settings = KVCacheSettings(kind, recent_window=16, page_size=16)  # type: ignore[arg-type]
    scales = SCALES if kind == "fp8" else ()
    heads = {
        layer: HeadScales((found.k,) * 2, (found.v,) * 2) for layer, found in enumerate(scales)
    }
    config = KVCacheConfig(settings.kind, 16, 16, heads or None)
    runner = Runner(load_dense(tmp_path / "model"), config, PoolLimits(num_pages=40))
    (tokens,), (logits,), _ = greedy(runner, [PROMPT], NEW_TOKENS, chunk=23, page_size=16)

    reader = open_checkpoint(tmp_path / "model")
    cache = KVCache(settings, scales)
    scorers = [
        WalkerScorer(read_structure(reader), reader, tmp_path, kv_cache=kept)
        for kept in (cache, None)
    ]
    whole = torch.tensor(PROMPT + tokens)
    rows = len(PROMPT) - 1, len(PROMPT) - 1 + NEW_TOKENS
    ours, sixteen_bit = (scorer.score([whole]).logits(0, *rows) for scorer in scorers)
    engine = torch.stack(logits).float()
    apart = float((engine - sixteen_bit).abs().max())
    # A code may fall to the other side of a tie; every other mistake is as large as `apart`.
    assert float((engine - ours).abs().mean()) < apart / 50
    assert apart > 1e-3


def write_config(folder: Path, settings: KVCacheSettings) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[CONFIG_KEY] = own_section(settings)
    (folder / "config.json").write_text(json.dumps(config))


def test_auto_takes_what_the_checkpoint_was_judged_with(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, CONFIGS["llama"]())
    assert choose_cache("auto", folder) == KVCacheConfig("auto")
    write_config(folder, KVCacheSettings("int4", 32, 16))
    assert choose_cache("auto", folder) == KVCacheConfig("int4", 16, 32)
    assert choose_cache("auto", str(folder)) == KVCacheConfig("int4", 16, 32)
    for name in ("bf16", "int8", "fp8"):
        assert choose_cache(name, folder) == KVCacheConfig(name)  # type: ignore[arg-type]
    chosen = KVCacheConfig("int4", 64, 128)
    assert choose_cache(chosen, folder) is chosen
    assert choose_cache("auto", load_dense(folder)) == KVCacheConfig("auto")
