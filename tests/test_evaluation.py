"""The gate on a directory: it judges what the directory's own files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_jobs import small_recipe, write_job, write_text
from support.tiny_models import rewrite_config

import llmopt
from llmopt.comparison import margin_bits
from llmopt.errors import BadInputError, BrokenArtifactError, ExitCode
from llmopt.evaluation import Evaluation
from llmopt.pipeline import quantize


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> Path:
    output = tmp_path_factory.mktemp("published") / "out"
    return quantize(source, small_recipe(text, stage={"solver": "rtn"}), output).path


@pytest.fixture
def artifact(tmp_path: Path, published: Path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def judge(artifact: Path, source: Path, text: Path) -> Evaluation:
    recipe = small_recipe(text, gate={"margins": {"mean_kl": 0.5}})
    return llmopt.evaluate(artifact, source, recipe=recipe, text=str(text))


def test_an_untouched_artifact_passes(artifact: Path, source: Path, text: Path) -> None:
    assert judge(artifact, source, text).exit_code is ExitCode.PASS


def test_a_changed_config_is_computed_with_and_fails(
    artifact: Path, source: Path, text: Path
) -> None:
    rewrite_config(artifact, rms_norm_eps=30.0)
    result = judge(artifact, source, text)
    assert result.exit_code is ExitCode.FAIL
    assert any("config.json" in note for note in result.notes)


def change_shard(artifact: Path, name: str, change: object) -> None:
    for path in artifact.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            assert callable(change)
            change(tensors)
            save_file(tensors, path, {"format": "pt"})
            return
    raise AssertionError(name)


def test_an_artifact_that_computes_nan_fails_and_is_no_bad_input(
    artifact: Path, source: Path, text: Path
) -> None:
    name = "model.layers.1.input_layernorm.weight"
    change_shard(artifact, name, lambda tensors: tensors[name].fill_(float("inf")))
    with pytest.raises(BrokenArtifactError, match="does not compute") as caught:
        judge(artifact, source, text)
    assert caught.value.exit_code is ExitCode.FAIL


def test_infinite_scales_are_named(artifact: Path, source: Path, text: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale"
    change_shard(artifact, name, lambda tensors: tensors[name].fill_(float("inf")))
    with pytest.raises(BadInputError, match="layers.1.mlp.up_proj has scales of NaN or infinity"):
        judge(artifact, source, text)


def test_tensors_that_the_source_has_not_are_no_comparison(
    artifact: Path, source: Path, text: Path
) -> None:
    name = "model.layers.1.input_layernorm.weight"
    change_shard(artifact, name, lambda tensors: tensors.update({"extra": torch.ones(2)}))
    (artifact / "model.safetensors.index.json").unlink()
    with pytest.raises(BadInputError, match="extra|index"):
        judge(artifact, source, text)


def test_another_tokenizer_is_no_comparison(artifact: Path, source: Path, text: Path) -> None:
    path = artifact / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BadInputError, match="gives other tokens"):
        judge(artifact, source, text)


def test_margins_follow_the_width_of_most_parameters() -> None:
    assert margin_bits([(4, 100), (2, 1)]) == 4
    assert margin_bits([(4, 7), (2, 9)]) == 2
    assert margin_bits([(8, 5), (3, 5)]) == 8
