"""The benchmark's models: trained once and found again, random and written shard by shard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.small_jobs import make_text
from transformers import AutoModelForCausalLM, LlamaConfig

from llmopt.bench import model as bench_models
from llmopt.bench.model import PLAN, bench_model
from llmopt.bench.quantize import GROUP_SIZE
from llmopt.bench.random_llama import random_llama_config, write_random_llama
from llmopt.calibration.documents import Document
from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.demo.tokenizer import END_OF_TEXT_ID
from llmopt.errors import BadInputError

SMALL = LlamaConfig(
    vocab_size=101,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def test_the_trained_model_is_made_once_and_named_by_what_decides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(f"topic:{i}", make_text(3, seed=i)) for i in range(4)]
    monkeypatch.setattr(bench_models, "builtin_documents", lambda split: documents)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = replace(PLAN, steps=1, batch_tokens=64, length=32)
    folder = bench_model(plan)
    assert folder.parent == tmp_path / "llmopt" / "bench"
    structure = read_structure(open_checkpoint(folder))
    assert structure.tied_head and structure.num_blocks == 8
    for name in structure.linear_names(0):
        weight = structure.block(0).get_submodule(name).weight
        assert weight.shape[1] % GROUP_SIZE == 0, name
    tokenizer = load_tokenizer(folder).tokenizer
    assert tokenizer("def f(): pass")["input_ids"] and tokenizer.bos_token_id == END_OF_TEXT_ID
    monkeypatch.setattr(bench_models, "write_trained_model", None)
    assert bench_model(plan) == folder
    documents.append(Document("topic:9", "another text"))
    with pytest.raises(TypeError):  # another text, another model: it would be trained now
        bench_model(plan)


def test_a_random_llama_is_the_same_for_a_seed_and_opens_in_transformers(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 1), (again, 1), (other, 2)):
        write_random_llama(folder, SMALL, seed)
    shards = sorted(first.glob("*.safetensors"))
    assert len(shards) == 3 + 3  # the blocks; embedding, norm and head
    for shard in shards:
        assert shard.read_bytes() == (again / shard.name).read_bytes()
        assert shard.read_bytes() != (other / shard.name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(first)
    assert model.dtype == torch.bfloat16
    weights = model.state_dict()
    assert 0.9 < weights["model.norm.weight"].float().mean() < 1.1
    assert weights["lm_head.weight"].float().std() == pytest.approx(0.02, rel=0.1)
    assert read_structure(open_checkpoint(first)).num_blocks == 3


def test_the_large_one_has_its_billion() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(random_llama_config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.1e9, rel=0.001)


def test_a_random_llama_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine", "utf-8")
    with pytest.raises(BadInputError, match="not empty"):
        write_random_llama(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
