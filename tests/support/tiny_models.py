"""Small random checkpoints of every supported architecture, written to disk for tests.

Norm weights, biases and soft caps are far from their neutral values, so that a walk which loses
one of them gives other logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCABULARY = 97
HIDDEN = 32
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GEMMA: dict[str, Any] = {
    **_COMMON,
    "query_pre_attn_scalar": 12,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,  # as many as the text model: a count alone must not find the blocks
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def llama_config(**changes: Any) -> Any:
    """Plain Llama with grouped-query attention."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**_COMMON, **changes})


def llama_biased_config(**changes: Any) -> Any:
    """Llama with a bias in every linear layer, and llama3 rotary scaling."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return llama_config(attention_bias=True, mlp_bias=True, rope_parameters=rope, **changes)


def mistral_config(**changes: Any) -> Any:
    """Mistral with a sliding window."""
    from transformers import MistralConfig

    return MistralConfig(**{**_COMMON, "sliding_window": WINDOW, **changes})


def qwen2_config(**changes: Any) -> Any:
    """Qwen2: biases in q, k, v; the upper blocks have a sliding window."""
    from transformers import Qwen2Config

    windows = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return Qwen2Config(**{**_COMMON, **windows, **changes})


def qwen3_config(**changes: Any) -> Any:
    """Qwen3: norms on q and k."""
    from transformers import Qwen3Config

    return Qwen3Config(**{**_COMMON, **changes})


def gemma2_config(**changes: Any) -> Any:
    """Gemma 2: soft caps, alternating windows, four norms a block, 1 + w norms, tied."""
    from transformers import Gemma2Config

    return Gemma2Config(**{**_GEMMA, **changes})


def gemma3_config(**changes: Any) -> Any:
    """Gemma 3 text: alternating windows with a rotary base each, q/k norms, tied."""
    from transformers import Gemma3TextConfig

    rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    values = {**_GEMMA, "attn_logit_softcapping": None, "rope_parameters": rope, **changes}
    return Gemma3TextConfig(**values)


def gemma3_multimodal_config(**changes: Any) -> Any:
    """Gemma3ForConditionalGeneration: the Gemma 3 text model beside a small vision tower."""
    from transformers import Gemma3Config

    return Gemma3Config(
        # The wrapper's forward in transformers leaves the soft cap out.
        text_config=gemma3_config(**{"final_logit_softcapping": None, **changes}).to_dict(),
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_id=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )


def phi3_config(**changes: Any) -> Any:
    """Phi-3: q, k, v in one layer, gate and up in another; a window; rotates half of a head.

    As on the hub it offers code of its own, which transformers has had for long.
    """
    from transformers import Phi3Config

    values = {
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": 0,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
    }
    return Phi3Config(**{**_COMMON, **values, **changes})


def olmo2_config(**changes: Any) -> Any:
    """OLMo 2: norms after attention and MLP, none before; q/k norms over all heads at once."""
    from transformers import Olmo2Config

    return Olmo2Config(**{**_COMMON, **changes})


def smollm3_config(**changes: Any) -> Any:
    """SmolLM3: the second layer rotates nothing; tied."""
    from transformers import SmolLM3Config

    layers = {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}
    return SmolLM3Config(**{**_COMMON, **layers, **changes})


_MIXTURE: dict[str, Any] = {**_COMMON, "num_experts_per_tok": 2}


def qwen3_moe_config(**changes: Any) -> Any:
    """Qwen3-MoE: the middle layer is dense; five experts, routed by unnormalized weights."""
    from transformers import Qwen3MoeConfig

    mixture = {"num_experts": 5, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    return Qwen3MoeConfig(**{**_MIXTURE, **mixture, "norm_topk_prob": False, **changes})


def mixtral_config(**changes: Any) -> Any:
    """Mixtral: other names on disk than in memory; a window."""
    from transformers import MixtralConfig

    mixture = {"num_local_experts": 4, "sliding_window": WINDOW}
    return MixtralConfig(**{**_MIXTURE, **mixture, **changes})


CONFIGS: Mapping[str, Callable[..., Any]] = {
    "llama": llama_config,
    "llama_biased": llama_biased_config,
    "mistral": mistral_config,
    "qwen2": qwen2_config,
    "qwen3": qwen3_config,
    "gemma2": gemma2_config,
    "gemma3": gemma3_config,
    "gemma3_multimodal": gemma3_multimodal_config,
    "phi3": phi3_config,
    "olmo2": olmo2_config,
    "smollm3": smollm3_config,
    "qwen3_moe": qwen3_moe_config,
    "mixtral": mixtral_config,
}


def build_model(config: Any, seed: int = 0) -> Any:
    """A transformers model in float32 for inference, every parameter drawn at random."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
            else:
                experts = parameter.ndim == 3  # (expert, out, in)
                fan_in = parameter.shape[-1] if experts else parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return model


def write_checkpoint(
    directory: Path,
    config: Any,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "10GB",
    names_in_memory: bool = False,
) -> Any:
    """Write a random checkpoint as transformers saves it.

    A multimodal wrapper's names are then those of the hub: `language_model.model.layers...`.

    Args:
        directory: made if absent.
        config: one of this module's configs.
        seed: of the weights.
        dtype: on disk.
        max_shard_size: "20KB" gives several shards.
        names_in_memory: store them as the wrapper's modules are called instead:
            `model.language_model.layers...` (one shard).

    Returns:
        The model as transformers loads it, in float32.
    """
    from transformers import AutoModelForCausalLM

    model = build_model(config, seed).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if names_in_memory:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        for tied in model.all_tied_weights_keys:
            tensors.pop(tied)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a one-shard checkpoint: to remove, rename or reshape some."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def rewrite_config(directory: Path, **changes: Any) -> None:
    """Change values of config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))
