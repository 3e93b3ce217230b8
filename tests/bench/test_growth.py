"""A grown model computes what its source computes, and the road quantizes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.small_jobs import VOCAB_SIZE, small_recipe, write_job
from support.tiny_models import CONFIGS, rewrite_config, write_checkpoint
from transformers import AutoModelForCausalLM

from llmopt.bench.decode.models import quantized_files
from llmopt.bench.grown_model import cached_grown_model, grow_checkpoint, grown_label
from llmopt.bench.growth import (
    LABEL,
    MIN_BLOCKS,
    Growth,
    count_parameters,
    grow_tensor,
    parse_count,
    plan_growth,
    rotary_type,
)
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.demo.paths import demo_model_path
from llmopt.errors import BadInputError
from llmopt.formats.dequantized import DequantizedSource
from llmopt.loading import load


def logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(tokens).logits


def tokens_for(vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("architecture", "factor", "tied"),
    [
        ("llama_biased", 4, True),
        ("llama_biased", 8, False),
        ("mistral", 4, False),
        ("qwen2", 2, True),
        ("qwen2", 1, False),
    ],
)
def test_the_grown_model_computes_the_sources_logits(
    tmp_path: Path, architecture: str, factor: int, tied: bool
) -> None:
    config = CONFIGS[architecture](tie_word_embeddings=tied)
    write_checkpoint(tmp_path / "source", config, dtype=torch.bfloat16)
    growth = Growth(factor, 5, 256)
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", 0, growth=growth)
    tokens = tokens_for(config.vocab_size)
    # 16-bit weights in float64: had growing rounded one of them, 1e-9 would be far off.
    wanted, found = (logits(tmp_path / part, tokens, torch.float64) for part in ("source", "grown"))
    assert wanted.abs().max() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    wanted, found = (logits(tmp_path / part, tokens, torch.float32) for part in ("source", "grown"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_no_block_is_left_out_and_the_added_ones_are_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS["llama"](), dtype=torch.bfloat16)
    made = grow_checkpoint(tmp_path / "source", tmp_path / "grown", 0, growth=Growth(4, 5, 256))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert sum(p.numel() for p in model.parameters()) == made.num_parameters
    assert len(model.model.layers) == 5
    assert model.model.layers[3].self_attn.q_proj.weight.any()
    assert not model.model.layers[3].self_attn.o_proj.weight.any()
    assert not model.model.layers[4].mlp.down_proj.weight.any()
    assert model.model.layers[2].mlp.down_proj.weight.any()


def test_bf16_logits_of_the_demo_model_grown_are_its_own(tmp_path: Path) -> None:
    grow_checkpoint(demo_model_path(), tmp_path / "grown", 0, growth=Growth(4, 5, 2048))
    tokens = tokens_for(4096)
    wanted, found = (
        logits(folder, tokens, torch.bfloat16).float()
        for folder in (demo_model_path(), tmp_path / "grown")
    )
    exact = logits(demo_model_path(), tokens, torch.float32)
    # Sums over four times as many columns are taken in another order, and rounded alike.
    noise = (wanted - exact).abs().mean()
    assert (found - wanted).abs().mean() < noise
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_a_norm_that_cannot_be_halved_exactly_is_refused(name: str) -> None:
    smallest = torch.tensor([2.0**-24, 1.0], dtype=torch.float16)
    with pytest.raises(BadInputError, match="float16"):
        grow_tensor(name, smallest, Growth(4, 4, 64))


def test_the_plan_meets_the_number_of_parameters() -> None:
    reader = open_checkpoint(demo_model_path())
    shapes = {name: tuple(reader.info(name).shape) for name in reader.names}
    for text, factor in (("300M", 4), ("1B", 8)):
        growth = plan_growth(reader.config, shapes, parse_count(text))
        assert growth.factor == factor
        assert growth.num_blocks >= MIN_BLOCKS
        assert count_parameters(shapes, growth) == pytest.approx(parse_count(text), rel=0.03)
    assert plan_growth(reader.config, shapes, parse_count("1B"), 4500).positions == 4500


@pytest.mark.parametrize("text", ["", "many", "300", "-1M", "0B", "1.2.3M"])
def test_what_is_no_number_of_parameters_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="number of parameters"):
        parse_count(text)


def test_numbers_of_parameters_are_read() -> None:
    assert parse_count("300M") == 300_000_000
    assert parse_count(" 1.5b") == 1_500_000_000


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("qwen3", {}, "'qwen3'"),
        ("gemma2", {}, "'gemma2'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ],
)
def test_what_cannot_be_grown_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], said: str
) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS[architecture]())
    rewrite_config(tmp_path / "source", **changes)
    with pytest.raises(BadInputError, match=said):
        grow_checkpoint(tmp_path / "source", tmp_path / "grown", 10**6)


def test_too_few_parameters_are_refused_with_the_least(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="ask for 14M or more"):
        grow_checkpoint(demo_model_path(), tmp_path / "grown", 10**6)


def test_a_rotary_embedding_that_follows_the_context_keeps_it() -> None:
    reader = open_checkpoint(demo_model_path())
    shapes = {name: tuple(reader.info(name).shape) for name in reader.names}
    config = {**reader.config, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    assert plan_growth(config, shapes, 10**9).positions == 2048
    with pytest.raises(BadInputError, match="yarn"):
        plan_growth(config, shapes, 10**9, 4096)
    assert rotary_type({"rope_scaling": {"type": "linear"}}) == "linear"


def test_the_config_says_that_it_is_grown_and_the_cache_makes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_checkpoint(tmp_path / "source", CONFIGS["llama"](), dtype=torch.bfloat16)
    folder = cached_grown_model(tmp_path / "source", 2 * 10**6, 300)
    config = json.loads((folder / "config.json").read_text())
    assert config[LABEL]["factor"] == 4
    assert config["max_position_embeddings"] == 300
    assert grown_label(config) == "source grown to 2 M"
    assert grown_label({}) == ""
    assert AutoModelForCausalLM.from_pretrained(folder).config.llmopt_grown["source"] == "source"
    before = (folder / "config.json").stat().st_mtime_ns
    assert cached_grown_model(tmp_path / "source", 2 * 10**6, 300) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert cached_grown_model(tmp_path / "source", 2 * 10**6, 400) != folder


def quantized_logits(model: Path, recipe: Path, output: Path) -> torch.Tensor:
    calibration = torch.randint(VOCAB_SIZE, (4, 64), generator=torch.Generator().manual_seed(2))
    made = quantized_files(model, str(recipe), output, torch.bfloat16, tokens=calibration)
    assert made.is_packed
    packed = load(output, dtype=torch.float32)
    with torch.inference_mode():
        return packed(tokens_for(VOCAB_SIZE)).logits


@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_the_road_quantizes_a_grown_model(tmp_path: Path, solver: str) -> None:
    source, grown = write_job(tmp_path), tmp_path / "grown"
    grow_checkpoint(source, grown, 0, growth=Growth(4, 4, 256))
    recipe = tmp_path / "small.yaml"
    data = small_recipe("builtin", stage={"solver": solver}).model_dump(mode="json")
    recipe.write_text(yaml.safe_dump(data))
    found = quantized_logits(grown, recipe, tmp_path / "output")
    assert grown_label(open_checkpoint(tmp_path / "output").config) == "source grown to 1 M"
    weights = DequantizedSource(open_checkpoint(tmp_path / "output"))
    # Most groups of the first are zero, all of the second.
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.o_proj"):
        assert name in weights.quantized_modules
        weight, wanted = (
            part.read(f"{name}.weight").float() for part in (weights, open_checkpoint(grown))
        )
        assert (wanted == 0).float().mean() > 0.9
        assert (weight - wanted).abs().max() <= wanted.abs().max()
    if solver == "rtn":
        # A group of zeros rounds to zeros, any other as it does in the source.
        own = quantized_logits(source, recipe, tmp_path / "own")
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    else:
        plain = logits(source, tokens_for(VOCAB_SIZE), torch.float32)
        assert (found - plain).abs().mean() < 0.6 * plain.abs().mean()
