"""Published models' configs, as their makers wrote them, and what their files must say."""

from __future__ import annotations

from typing import Any

import pytest

from llmopt.checkpoint.skeleton import read_configs
from llmopt.formats.gguf.architectures.metadata import PlannedMetadata, find_family, plan_metadata

MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "Mistral-Nemo-Base-2407": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "Phi-4-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [float(index + 1) for index in range(48)],
            "short_factor": [1.0] * 48,
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "OLMo-2-1124-7B": {
        "model_type": "olmo2",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06,
        "rope_theta": 500000,
        "rope_scaling": None,
        "vocab_size": 100352,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 65536,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "vocab_size": 128256,
    },
}

SAID: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "llama.context_length": 131072,
        "llama.attention.key_length": 64,
        "llama.rope.freq_base": 500000.0,
    },
    "Mistral-7B-v0.1": {"llama.context_length": 4096, "llama.attention.key_length": 128},
    "Mistral-Nemo-Base-2407": {
        "llama.context_length": 131072,
        "llama.attention.key_length": 128,
        "llama.embedding_length": 5120,
    },
    "Qwen3-30B-A3B": {
        "qwen3moe.expert_count": 128,
        "qwen3moe.expert_used_count": 8,
        "qwen3moe.expert_feed_forward_length": 768,
        "qwen3moe.context_length": 40960,
    },
    "gemma-2-27b": {
        "gemma2.attention.sliding_window": 4096,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
    },
    "gemma-3-27b": {
        "gemma3.context_length": 131072,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.rope.freq_base": 1000000.0,
        "gemma3.rope.freq_base_swa": 10000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    },
    "Phi-4-mini": {
        "phi3.context_length": 131072,
        "phi3.rope.dimension_count": 96,
        "phi3.rope.scaling.original_context_length": 4096,
        "phi3.rope.scaling.attn_factor": pytest.approx(1.190238),
    },
    "OLMo-2-1124-7B": {"olmo2.context_length": 4096, "olmo2.rope.freq_base": 500000.0},
    "SmolLM3-3B": {"smollm3.context_length": 65536, "smollm3.rope.freq_base": 5000000.0},
}


def plan_of(name: str) -> PlannedMetadata:
    _, text = read_configs(MODELS[name])
    return plan_metadata(find_family(text), text, text.vocab_size)


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_says_what_its_config_does(name: str) -> None:
    values = {key: value.value for key, value in plan_of(name).values.items()}
    assert {key: values.get(key) for key in SAID[name]} == SAID[name]
    # Gemma's usual pattern of windows is the loader's own.
    assert not any(key.endswith("sliding_window_pattern") for key in values)


def test_what_they_have_beside_metadata() -> None:
    llama = plan_of("Llama-3.2-1B").factors["rope_freqs.weight"]
    assert (len(llama), llama[0], llama[-1]) == (32, 1.0, 32.0)
    phi = plan_of("Phi-4-mini")
    assert phi.factors["rope_factors_long.weight"] == tuple(float(i + 1) for i in range(48))
    assert "more than 4096 tokens" in phi.notes[0]
    assert "the window, 4096" in plan_of("Mistral-7B-v0.1").notes[0]
    for name in ("Mistral-Nemo-Base-2407", "gemma-3-27b", "Qwen3-30B-A3B", "SmolLM3-3B"):
        assert plan_of(name).notes == ()
