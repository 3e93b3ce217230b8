from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from support import gguf_models, tiny_models
from support.gguf_models import CONFIGS, open_and_plan
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures import FilePlan, plan_file
from llmopt.formats.gguf.architectures.tables import FAMILIES


def plan_of(directory: Path, config: Any) -> FilePlan:
    tiny_models.build_model(config).save_pretrained(directory)
    return open_and_plan(directory)[1]


def said(plan: FilePlan) -> dict[str, Any]:
    prefix = f"{plan.architecture}."
    return {key.removeprefix(prefix): value.value for key, value in plan.metadata.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_the_checkpoint_has_a_fate(name: str, tmp_path: Path) -> None:
    tiny_models.build_model(CONFIGS[name]()).save_pretrained(tmp_path)
    reader, plan = open_and_plan(tmp_path)
    used = [source for tensor in plan.tensors for source in tensor.sources]
    dropped = [tensor.name for tensor in plan.dropped]
    assert len(set(used)) == len(used)
    assert sorted(used + dropped) == sorted(reader.names)
    assert all(tensor.reason for tensor in plan.dropped)
    names = [tensor.gguf_name for tensor in plan.tensors]
    assert len(set(names)) == len(names)
    assert names[0] == "token_embd.weight"
    for tensor in plan.tensors:
        parts = [reader.read(source) for source in tensor.sources]
        assert tuple(tensor.assemble(parts).shape) == tensor.shape


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_the_gguf_package(name: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, CONFIGS[name]())
    architecture = next(a for a, found in MODEL_ARCH_NAMES.items() if found == plan.architecture)
    known = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[architecture]}
    names = gguf.get_tensor_name_map(architecture, plan.facts.num_blocks)
    for tensor in plan.tensors:
        base = tensor.gguf_name.rpartition(".")[0]
        block = base.split(".")[1] if base.startswith("blk.") else "0"
        assert base.replace(f"blk.{block}.", "blk.{bid}.") in known, tensor.gguf_name
        if tensor.sources and not tensor.transform.stacked and "multimodal" not in name:
            found = names.get_name(tensor.sources[0], try_suffixes=(".weight", ".bias"))
            assert found == tensor.gguf_name


def test_the_families_names_are_llama_cpps() -> None:
    known = set(MODEL_ARCH_NAMES.values())
    assert {family.architecture for family in FAMILIES} <= known
    assert MODEL_ARCH.LLAMA in MODEL_ARCH_NAMES


def test_a_llama_says_its_dimensions(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, tiny_models.llama_config())
    assert said(plan) == {
        "general.type": "model",
        "context_length": 256,
        "embedding_length": 32,
        "block_count": 3,
        "feed_forward_length": 48,
        "vocab_size": 97,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
    }
    assert plan.notes == ()


def test_a_window_that_llama_cpp_does_not_compute_ends_the_context(tmp_path: Path) -> None:
    for name, config in (
        ("mistral", tiny_models.mistral_config()),
        ("mixtral", tiny_models.mixtral_config()),
        ("qwen2", tiny_models.qwen2_config()),
        ("phi3", tiny_models.phi3_config()),
    ):
        plan = plan_of(tmp_path / name, config)
        assert said(plan)["context_length"] == 8
        assert "does not compute the model's sliding window" in plan.notes[0]
    plan = plan_of(tmp_path / "wide", tiny_models.mistral_config(sliding_window=256))
    assert (said(plan)["context_length"], plan.notes) == (256, ())
    plan = plan_of(tmp_path / "none", tiny_models.mistral_config(sliding_window=None))
    assert (said(plan)["context_length"], plan.notes) == (256, ())


def test_gemma_says_windows_and_caps(tmp_path: Path) -> None:
    second = said(plan_of(tmp_path / "2", gguf_models.gemma2_config()))
    assert second["attention.sliding_window"] == 8
    assert "attention.sliding_window_pattern" not in second  # every other block, as is usual
    assert second["attn_logit_softcapping"] == 2.0
    assert second["final_logit_softcapping"] == 3.0
    third = said(plan_of(tmp_path / "3", gguf_models.gemma3_config()))
    assert third["attention.sliding_window_pattern"] == (True, False, True)
    assert third["rope.freq_base_swa"] == 100.0
    assert third["rope.scaling.factor"] == 4.0
    assert "attn_logit_softcapping" not in third


def test_a_gemma_2_that_sees_everything_has_a_window_of_its_whole_context(tmp_path: Path) -> None:
    config = gguf_models.gemma2_config(layer_types=["full_attention"] * 3)
    values = said(plan_of(tmp_path, config))
    assert values["attention.sliding_window"] == values["context_length"] == 256


def test_a_gemma_of_windows_alone_ends_with_its_window(tmp_path: Path) -> None:
    windows = {"layer_types": ["sliding_attention"] * 3}
    second = said(plan_of(tmp_path / "2", gguf_models.gemma2_config(**windows)))
    assert second["attention.sliding_window"] == second["context_length"] == 8
    plan = plan_of(tmp_path / "3", gguf_models.gemma3_config(**windows))
    assert said(plan)["context_length"] == 8
    assert "attention.sliding_window" not in said(plan)
    assert "does not compute the model's sliding window" in plan.notes[0]


def test_experts_are_counted_and_stacked(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, gguf_models.qwen3_moe_config())
    values = said(plan)
    assert values["expert_count"] == plan.facts.num_experts == 5
    assert values["expert_used_count"] == 2
    assert values["expert_feed_forward_length"] == 24
    stacks = {t.gguf_name: t for t in plan.tensors if t.transform.stacked}
    assert len(stacks) == 9
    down = stacks["blk.1.ffn_down_exps.weight"]
    assert down.shape == (5, 32, 24)
    assert [name.split(".")[5] for name in down.sources] == ["0", "1", "2", "3", "4"]


def test_llama3_factors_are_those_of_transformers(tmp_path: Path) -> None:
    config = gguf_models.llama3_config()
    plan = plan_of(tmp_path, config)
    (factors,) = [t for t in plan.tensors if t.gguf_name == "rope_freqs.weight"]
    assert factors.shape == (4,)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors.assemble(), scaled)
    assert len(set(factors.assemble().tolist())) > 2  # kept, between, stretched


def test_yarn_and_longrope_say_their_attention_factor(tmp_path: Path) -> None:
    yarn = said(plan_of(tmp_path / "yarn", gguf_models.yarn_config()))
    assert yarn["rope.scaling.original_context_length"] == 64
    # llama.cpp multiplies by 0.1 ln(factor) + 1 on its own.
    own = 0.1 * math.log(4.0) + 1
    assert yarn["rope.scaling.attn_factor"] * own == pytest.approx(1.3)
    longrope = plan_of(tmp_path / "longrope", gguf_models.longrope_config())
    grown = math.sqrt(1 + math.log(2) / math.log(128))
    assert said(longrope)["rope.scaling.attn_factor"] == pytest.approx(grown)
    assert "a context of more than 128 tokens" in longrope.notes[0]
    assert [t.gguf_name for t in longrope.tensors[1:3]] == [
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    ]


def test_a_head_that_repeats_the_embedding_is_dropped(tmp_path: Path) -> None:
    config = tiny_models.llama_config(tie_word_embeddings=True)
    tiny_models.build_model(config).save_pretrained(tmp_path)

    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.rotary_emb.inv_freq"] = torch.zeros(4)

    tiny_models.rewrite_tensors(tmp_path, repeat)
    _, plan = open_and_plan(tmp_path)
    assert {tensor.name for tensor in plan.dropped} == {
        "lm_head.weight",
        "model.rotary_emb.inv_freq",
    }
    assert "output.weight" not in {tensor.gguf_name for tensor in plan.tensors}


def test_olmo_2_repeats_a_tied_head_since_its_loader_wants_one(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, tiny_models.olmo2_config(tie_word_embeddings=True))
    sources = {tensor.gguf_name: tensor.sources for tensor in plan.tensors}
    assert sources["output.weight"] == sources["token_embd.weight"]


ROPE = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
REFUSED: dict[str, tuple[Any, str]] = {
    "activation": (lambda: tiny_models.llama_config(hidden_act="gelu"), "the MLP computes gelu"),
    "scalar": (tiny_models.gemma2_config, "query_pre_attn_scalar is 12, not 8"),
    "capped": (
        lambda: gguf_models.gemma3_config(attn_logit_softcapping=2.0),
        "attention is capped",
    ),
    "not capped": (
        lambda: gguf_models.gemma2_config(final_logit_softcapping=None),
        "are not capped",
    ),
    "untied": (
        lambda: gguf_models.gemma2_config(tie_word_embeddings=False),
        "always takes the embedding",
    ),
    "no rope": (tiny_models.smollm3_config, "no_rope_layers"),
    "dense block": (
        lambda: tiny_models.qwen3_moe_config(norm_topk_prob=True),
        "some blocks have no experts",
    ),
    "unnormalized": (
        lambda: tiny_models.qwen3_moe_config(mlp_only_layers=[]),
        "do not sum to 1",
    ),
    "biases": (
        lambda: tiny_models.olmo2_config(attention_bias=True),
        "olmo2 ignores model.layers.0.self_attn.q_proj.bias",
    ),
    "output bias": (
        lambda: tiny_models.qwen3_config(attention_bias=True),
        "qwen3 ignores model.layers.0.self_attn.*bias",
    ),
    "heads": (lambda: tiny_models.qwen2_config(head_dim=16), "4 heads of 16 do not make up"),
    "dynamic": (
        lambda: tiny_models.llama_config(rope_parameters={"rope_type": "dynamic", **ROPE}),
        "'dynamic' has no equivalent",
    ),
    "llama3 elsewhere": (
        lambda: tiny_models.qwen3_config(
            rope_parameters={
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **ROPE,
            }
        ),
        "'llama3' has no equivalent in llama.cpp's qwen3",
    ),
    "beta": (
        lambda: tiny_models.qwen3_config(
            rope_parameters={"rope_type": "yarn", "beta_fast": 16.0, **ROPE}
        ),
        "beta_fast 16",
    ),
    "truncate": (
        lambda: tiny_models.qwen3_config(
            rope_parameters={"rope_type": "yarn", "truncate": False, **ROPE}
        ),
        "truncate: false",
    ),
    "scaled windows": (
        lambda: gguf_models.gemma3_config(
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
            }
        ),
        "blocks with a window have linear",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(BadInputError, match=message) as caught:
        plan_of(tmp_path, make())
    assert caught.value.remedy


def test_an_unknown_architecture_and_a_quantized_checkpoint_are_refused(tmp_path: Path) -> None:
    from transformers import GlmConfig

    config = GlmConfig(**{**tiny_models._COMMON, "pad_token_id": 0})
    with pytest.raises(BadInputError, match="no GGUF file of a 'glm' model"):
        plan_of(tmp_path / "glm", config)
    tiny_models.build_model(tiny_models.llama_config()).save_pretrained(tmp_path / "llama")
    structure = read_structure(open_checkpoint(tmp_path / "llama"))
    with pytest.raises(BadInputError, match="already quantized"):
        plan_file(structure, {"quantization_config": {"quant_method": "gptq"}})
