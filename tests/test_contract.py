from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_jobs import small_recipe
from support.tiny_models import (
    llama_config,
    mixtral_config,
    phi3_config,
    qwen2_config,
    write_checkpoint,
)

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.contract import Contract, check_consumer, draw_contract
from llmopt.errors import BadInputError, ContractError
from llmopt.recipe import load_recipe

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
WIDTHS |= {"num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    write_checkpoint(folder, llama_config(**WIDTHS), dtype=torch.bfloat16)
    return folder


def contract(source: Path, **changes: Any) -> Contract:
    reader = open_checkpoint(source)
    return draw_contract(reader, read_structure(reader), small_recipe("text.txt", **changes))


def test_what_fits_is_agreed_and_counted(source: Path) -> None:
    agreed = contract(source, output={"consumers": ["transformers", "vllm", "vllm-cpu"]})
    agreed.enforce()
    structure = read_structure(open_checkpoint(source))
    assert len(agreed.schemes) == 7 * structure.num_blocks and not agreed.kept
    assert [consumer.name for consumer in agreed.consumers] == ["transformers", "vllm", "vllm-cpu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": {"scheme": {"group_size": 48}}}, "group size 48 does not divide"),
        ({"stage": {"scheme": {"group_size": None, "activation_order": "group"}}}, "cannot hold"),
        (
            {"stage": {"solver": "rtn", "scheme": {"group_size": 32, "activation_order": "group"}}},
            "rtn sees no activations",
        ),
        (
            {
                "stage": {
                    "static_groups": False,
                    "scheme": {"group_size": 32, "activation_order": "weight"},
                }
            },
            "static_groups",
        ),
        ({"stage": {"ignore": ["*"]}}, "every layer is ignored"),
        (
            {
                "stage": {"scheme": {"bits": 8, "group_size": 32}},
                "output": {"consumers": ["vllm-cpu"]},
            },
            "WNA16",
        ),
        (
            {
                "stage": {"scheme": {"group_size": 128}},
                "output": {"consumers": ["vllm"], "tensor_parallel_size": 2},
            },
            "groups of 128 do not divide 64 input features",
        ),
        (
            {
                "stage": {"ignore": ["*.q_proj"]},
                "output": {"consumers": ["vllm"]},
            },
            "are one layer there but have",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    source: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        contract(source, **changes).enforce()


def test_transformers_does_not_fuse_so_it_takes_what_vllm_refuses(source: Path) -> None:
    changes = {"stage": {"ignore": ["*.q_proj"]}, "output": {"consumers": ["transformers"]}}
    agreed = contract(source, **changes)
    agreed.enforce()
    assert all(name.endswith("q_proj") for name in agreed.kept) and agreed.kept


@pytest.mark.parametrize("layer", ["q", "k", "v"])
def test_every_layer_of_a_shared_input_is_held_to_the_consumer(source: Path, layer: str) -> None:
    asymmetric = {"match": f"*.{layer}_proj", "scheme": {"symmetric": False, "group_size": 32}}
    changes = {"stage": {"overrides": [asymmetric]}, "output": {"consumers": ["transformers"]}}
    with pytest.raises(ContractError, match="asymmetric 4 bits"):
        contract(source, **changes).enforce()
    fusing = contract(source, **{**changes, "output": {"consumers": ["vllm"]}})
    assert any("are one layer there" in refusal for refusal in fusing.refusals)
    assert not any("asymmetric 4 bits" in refusal for refusal in fusing.refusals)
    odd = {"match": f"*.{layer}_proj", "scheme": {"group_size": 16}}
    fusing = contract(source, stage={"overrides": [odd]}, output={"consumers": ["vllm"]})
    assert any("group size 16" in refusal for refusal in fusing.refusals)


def test_the_scales_of_every_layer_are_held_to_the_consumer(source: Path) -> None:
    reader = open_checkpoint(source)
    structure = read_structure(reader)
    agreed = contract(source)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name.endswith("v_proj") else torch.bfloat16

    found = check_consumer(
        "vllm", reader.config, structure, agreed.form, agreed.schemes, dtype_of, 1
    )
    details = [check.detail for check in found.checks if not check.passed]
    assert details == ["float32 models: its weight-only kernels take 16-bit activations"]


def test_rows_are_fused_only_where_the_consumer_fuses(tmp_path: Path) -> None:
    shapes = {
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    # q, k and v of 96, 16 and 16 rows: together a multiple of 32.
    config = llama_config(**{**WIDTHS, **shapes})
    write_checkpoint(tmp_path, config, dtype=torch.float16)
    stage = {"scheme": {"group_size": 32}}
    output = {"format": "gptq", "checkpoint_format": "gptq"}
    archived = contract(tmp_path, stage=stage, output={**output, "consumers": ["auto-gptq"]})
    assert any("16 fused output features" in refusal for refusal in archived.refusals)
    contract(tmp_path, stage=stage, output={**output, "consumers": ["vllm-cpu"]}).enforce()


def test_a_layer_that_is_fused_in_the_checkpoint_is_divided_by_rows(tmp_path: Path) -> None:
    widths = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = phi3_config(**widths, head_dim=24, intermediate_size=128)
    write_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    output = {"consumers": ["vllm"], "tensor_parallel_size": 2}
    stage = {"scheme": {"group_size": 32}, "ignore": ["*.o_proj", "*.down_proj"]}
    contract(tmp_path, stage=stage, output=output).enforce()
    with pytest.raises(ContractError, match="groups of 32 do not divide 48 input"):
        contract(tmp_path, stage={"scheme": {"group_size": 32}}, output=output).enforce()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": {"consumers": ["vlm"]}}, "unknown consumer 'vlm' \\(did you mean 'vllm'"),
        ({"output": {"format": "compressed-tensor"}}, "did you mean 'compressed-tensors'"),
        ({"stage": {"ignore": ["*.gproj"]}}, "matches no linear layer"),
        (
            {"stage": {"overrides": [{"match": "*.dwn_proj", "scheme": {}}]}},
            "matches no linear layer",
        ),
    ],
)
def test_names_that_nobody_knows(source: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        contract(source, **changes)


def test_a_tied_head_and_biases_are_accounted_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, qwen2_config(tie_word_embeddings=True, **WIDTHS))
    agreed = contract(tmp_path)
    agreed.enforce()
    assert any("tied to the embedding" in check.detail for check in agreed.checks)


def test_experts_are_held_to_what_the_consumer_does_with_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, mixtral_config(**WIDTHS))
    agreed = contract(tmp_path)
    agreed.enforce()
    assert len(agreed.schemes) == 3 * (4 + 4 * 3)
    details = {check.name: check.detail for check in agreed.consumers[0].checks}
    assert details["experts"] == "opens them as one layer a block (run)"
    one_expert = "model.layers.1.mlp.experts.2.*"
    with pytest.raises(ContractError, match="experts in 16 bit: it looks for packed experts"):
        contract(tmp_path, stage={"ignore": [one_expert]}).enforce()
    wide = {"match": one_expert, "scheme": {"bits": 8, "group_size": 32}}
    with pytest.raises(ContractError, match="experts of several schemes"):
        contract(tmp_path, stage={"overrides": [wide]}).enforce()
    contract(tmp_path, stage={"ignore": ["*.self_attn.*"]}).enforce()
    dense = contract(tmp_path, stage={"overrides": [{**wide, "match": "*.self_attn.*"}]})
    assert any("first config group" in refusal for refusal in dense.refusals)


def test_the_recipe_for_mixtures_fits_one_and_the_default_names_who_does_not_open_it(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path, mixtral_config(**WIDTHS), dtype=torch.bfloat16)
    reader = open_checkpoint(tmp_path)
    structure = read_structure(reader)
    draw_contract(reader, structure, load_recipe("int4-gptq-moe")).enforce()
    with pytest.raises(ContractError, match="vllm-cpu .*No WNA16 MoE backend"):
        draw_contract(reader, structure, load_recipe("int4-gptq")).enforce()
