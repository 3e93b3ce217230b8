from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import (
    CONFIGS,
    HIDDEN,
    VOCABULARY,
    gemma3_multimodal_config,
    llama_config,
    rewrite_config,
    rewrite_tensors,
    write_checkpoint,
)
from torch import Tensor, nn

from llmopt.checkpoint.block_layout import watch_block
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.shell import BlockCall
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.errors import BadInputError

ATTENTION = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
DENSE = (*ATTENTION, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
FUSED = (
    ("self_attn.qkv_proj",),
    ("self_attn.o_proj",),
    ("mlp.gate_up_proj",),
    ("mlp.down_proj",),
)


def mixture(num_experts: int) -> tuple[tuple[str, ...], ...]:
    experts = [f"mlp.experts.{expert}" for expert in range(num_experts)]
    return (
        *ATTENTION,
        *((f"{expert}.gate_proj", f"{expert}.up_proj") for expert in experts),
        *((f"{expert}.down_proj",) for expert in experts),
    )


def expected_groups(name: str, block: int) -> tuple[tuple[str, ...], ...]:
    if name == "qwen3_moe":
        return DENSE if block == 1 else mixture(5)
    return {"phi3": FUSED, "mixtral": mixture(4)}.get(name, DENSE)


def structure_of(directory: Path) -> ModelStructure:
    return read_structure(open_checkpoint(directory))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_a_blocks_the_texts_or_other(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS[name](), max_shard_size="20KB")
    reader = open_checkpoint(tmp_path)
    structure = read_structure(reader)
    assert structure.num_blocks == 3
    assert (structure.hidden_size, structure.vocabulary_size) == (HIDDEN, VOCABULARY)
    assert structure.block_prefix(2) == "model.layers.2"
    text = [*structure.outer_tensor_names]
    for block in range(3):
        text += structure.block_tensor_names(block)
        groups = expected_groups(name, block)
        assert structure.input_groups(block) == groups
        assert sorted(structure.linear_names(block)) == sorted(sum(groups, ()))
    on_disk = [structure.disk_name(memory) for memory in text]
    assert sorted([*on_disk, *structure.other_names]) == sorted(reader.names)
    assert all(parameter.is_meta for parameter in structure.skeleton.parameters())


def test_plain_model_has_its_own_names_on_disk(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    structure = structure_of(tmp_path)
    assert all(memory == disk for memory, disk in structure.disk_names.items())
    assert structure.other_names == ()
    assert not structure.tied_head
    assert structure.head_disk_name == "lm_head.weight"
    assert structure.embed_disk_name == "model.embed_tokens.weight"
    assert structure.anatomy.final_norm == "model.norm"


@pytest.mark.parametrize(
    ("in_memory", "prefix"),
    [(True, "model.language_model."), (False, "language_model.model.")],
)
def test_text_model_of_a_wrapper_under_either_naming(
    in_memory: bool, prefix: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, gemma3_multimodal_config(), names_in_memory=in_memory)
    structure = structure_of(tmp_path)
    assert structure.disk_name("model.layers.1.mlp.up_proj.weight") == (
        f"{prefix}layers.1.mlp.up_proj.weight"
    )
    assert structure.disk_module("model.layers.1.mlp.up_proj") == f"{prefix}layers.1.mlp.up_proj"
    assert structure.embed_disk_name == f"{prefix}embed_tokens.weight"
    assert structure.tied_head and structure.head_disk_name is None
    assert structure.config.model_type == "gemma3"
    assert structure.text_config.model_type == "gemma3_text"
    assert len(structure.other_names) == 66
    assert not any("language_model" in name for name in structure.other_names)


def test_untied_head_of_a_wrapper_is_found_beside_its_text_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, gemma3_multimodal_config())
    rewrite_config(tmp_path, tie_word_embeddings=False)
    head = torch.randn(VOCABULARY, HIDDEN)
    rewrite_tensors(tmp_path, lambda t: t.update({"language_model.lm_head.weight": head}))
    structure = structure_of(tmp_path)
    assert not structure.tied_head
    assert structure.head_disk_name == "language_model.lm_head.weight"


def test_tied_head_that_is_repeated_on_disk(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config(tie_word_embeddings=True))

    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite_tensors(tmp_path, repeat)
    structure = structure_of(tmp_path)
    assert structure.tied_head and structure.head_disk_name == "lm_head.weight"

    rewrite_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1))
    assert not structure_of(tmp_path).tied_head


def test_tied_model_stored_under_the_heads_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config(tie_word_embeddings=True))
    rewrite_tensors(
        tmp_path,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}
        ),
    )
    structure = structure_of(tmp_path)
    assert structure.tied_head and structure.head_disk_name is None
    assert structure.embed_disk_name == "lm_head.weight"


def test_stale_tensors_are_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    stale = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite_tensors(tmp_path, lambda tensors: tensors.update({stale: torch.ones(4)}))
    assert structure_of(tmp_path).other_names == (stale,)


@pytest.mark.parametrize("model_type", ["paperclip", None])
def test_unknown_architecture_is_named(model_type: str | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    rewrite_config(tmp_path, model_type=model_type, architectures=["PaperclipForCausalLM"])
    with pytest.raises(BadInputError, match=rf"{model_type!r}.*PaperclipForCausalLM") as caught:
        structure_of(tmp_path)
    assert "upgrade transformers" in caught.value.remedy


def test_architecture_without_a_causal_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    rewrite_config(tmp_path, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(BadInputError, match="no causal language model.*ViTModel"):
        structure_of(tmp_path)


def test_body_within_a_body_is_refused(tmp_path: Path) -> None:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    write_checkpoint(tmp_path, config)
    with pytest.raises(BadInputError, match="OPTForCausalLM is not a plain chain"):
        structure_of(tmp_path)


def test_values_that_transformers_refuses_are_bad_input(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    rewrite_config(tmp_path, hidden_size="wide")
    with pytest.raises(BadInputError, match=r"config\.json.*cannot be read"):
        structure_of(tmp_path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    lost = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    rewrite_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in lost] and None)
    with pytest.raises(BadInputError, match="lacks 3 of the 30 tensors of Llama") as caught:
        structure_of(tmp_path)
    assert all(name in caught.value.what for name in lost)


def test_quantized_checkpoint_is_called_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite_tensors(tmp_path, lambda t: t.update({f"{name}_packed": t.pop(name)}))
    rewrite_config(tmp_path, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(BadInputError, match="lacks 1") as caught:
        structure_of(tmp_path)
    assert "already quantized" in caught.value.remedy


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    rewrite_config(tmp_path, intermediate_size=40)
    with pytest.raises(BadInputError, match=r"9 tensors.*up_proj.*\[48, 32\], not \[40, 32\]"):
        structure_of(tmp_path)


def test_two_text_models_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())

    def double(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"draft.{name}": tensor.clone() for name, tensor in tensors.items()})

    rewrite_tensors(tmp_path, double)
    with pytest.raises(BadInputError, match=r"two text models, under 'draft\.model\.'"):
        structure_of(tmp_path)


def test_experts_form_two_waves_and_other_groups_one_each(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["qwen3_moe"]())
    structure = structure_of(tmp_path)
    groups = mixture(5)
    assert structure.waves(0) == (groups[:1], groups[1:2], groups[2:7], groups[7:])
    assert structure.waves(1) == tuple((group,) for group in DENSE)
    layout = structure.layouts[2]
    assert layout.expert_of("mlp.experts.3.up_proj") == "mlp.experts.3"
    assert layout.expert_of("self_attn.q_proj") is None


def test_names_of_a_mixture_on_disk_are_those_that_transformers_looks_up(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mixtral", CONFIGS["mixtral"]())
    mixtral = structure_of(tmp_path / "mixtral")
    experts = "model.layers.1.block_sparse_moe.experts"
    assert {
        part: mixtral.disk_module(f"model.layers.1.mlp.experts.3.{part}")
        for part in ("gate_proj", "down_proj", "up_proj")
    } == {
        "gate_proj": f"{experts}.3.w1",
        "down_proj": f"{experts}.3.w2",
        "up_proj": f"{experts}.3.w3",
    }
    assert mixtral.disk_module("model.layers.1.mlp.gate").endswith("1.block_sparse_moe.gate")
    write_checkpoint(tmp_path / "qwen", CONFIGS["qwen3_moe"]())
    qwen = structure_of(tmp_path / "qwen")
    assert all(memory == disk for memory, disk in qwen.disk_names.items())


def test_a_lost_expert_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["mixtral"]())
    lost = "model.layers.2.block_sparse_moe.experts.1.w3.weight"
    rewrite_tensors(tmp_path, lambda tensors: tensors.__delitem__(lost))
    with pytest.raises(
        BadInputError, match=r"lacks 1 of .* Mixtral.*: model\.layers\.2\.mlp\.experts\.1\.up_proj"
    ):
        structure_of(tmp_path)


def test_experts_stored_as_one_tensor_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["qwen3_moe"](), names_in_memory=True)
    with pytest.raises(BadInputError, match="lacks 30 of") as caught:
        structure_of(tmp_path)
    assert "save it again" in caught.value.remedy


class _Diamond(nn.Module):
    """Executes in another order than it declares; two inputs that are equal but not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.copied = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, scale: float) -> Tensor:
        inner = hidden * scale
        return self.last(self.left(inner) + self.right(inner) + self.copied(inner.clone()))


def test_groups_follow_tensor_identity_and_execution_order() -> None:
    with torch.device("meta"):
        block = _Diamond()
    layout = watch_block(block, "b", BlockCall((2.0,), {}), torch.empty(1, 3, 4, device="meta"))
    assert layout.linear_names == ("left", "right", "copied", "last")
    assert layout.input_groups == (("left", "right"), ("copied",), ("last",))
    block.unused = nn.Linear(4, 4, device="meta")
    with pytest.raises(BadInputError, match="does not use its linear layers unused"):
        watch_block(block, "b", BlockCall((2.0,), {}), torch.empty(1, 3, 4, device="meta"))
