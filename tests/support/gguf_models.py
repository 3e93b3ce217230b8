"""Small random checkpoints that llama.cpp has words for, and plain GGUF files of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from support import tiny_models
from torch import Tensor

from llmopt.checkpoint.reader import CheckpointReader, open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.formats.gguf.architectures import FilePlan, plan_file
from llmopt.formats.gguf.values import TypedValue, string, uint32
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.packing import pack_plain
from llmopt.quantization.ggml.types import GGML_TYPES

WINDOW = tiny_models.WINDOW


def llama3_config(**changes: Any) -> Any:
    """Llama with biases everywhere and llama3 rotary scaling."""
    config = tiny_models.llama_biased_config(**changes)
    # So that frequencies are kept, interpolated and stretched.
    config.rope_parameters["original_max_position_embeddings"] = 64
    return config


def yarn_config(**changes: Any) -> Any:
    """Qwen3 with YaRN and an attention factor of its own."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    }
    return tiny_models.qwen3_config(rope_parameters=rope, **changes)


def longrope_config(**changes: Any) -> Any:
    """Phi-3 with long and short factors."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.1, 1.3],
        "long_factor": [2.0, 5.0],
    }
    values = {"rope_parameters": rope, "original_max_position_embeddings": 128, **changes}
    return tiny_models.phi3_config(sliding_window=None, **values)


def linear_config(**changes: Any) -> Any:
    """Llama with linear rotary scaling, tied."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
    return tiny_models.llama_config(rope_parameters=rope, tie_word_embeddings=True, **changes)


def gemma2_config(**changes: Any) -> Any:
    """Gemma 2 with the scaling of attention that llama.cpp computes."""
    return tiny_models.gemma2_config(**{"query_pre_attn_scalar": 8, **changes})


def gemma3_config(**changes: Any) -> Any:
    """Gemma 3 with the same, and windows in another pattern than the usual."""
    return tiny_models.gemma3_config(**{"query_pre_attn_scalar": 8, **changes})


def gemma3_multimodal_config(**changes: Any) -> Any:
    """The same in its multimodal wrapper."""
    return tiny_models.gemma3_multimodal_config(**{"query_pre_attn_scalar": 8, **changes})


def smollm3_config(**changes: Any) -> Any:
    """SmolLM3: of five blocks the fourth rotates nothing."""
    layers = {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}
    return tiny_models.smollm3_config(**{**layers, **changes})


def qwen3_moe_config(**changes: Any) -> Any:
    """Qwen3-MoE with experts in every block, whose weights sum to one."""
    config = tiny_models.qwen3_moe_config(**{"mlp_only_layers": [], **changes})
    config.norm_topk_prob = True
    return config


CONFIGS: Mapping[str, Callable[..., Any]] = {
    "llama": tiny_models.llama_config,
    "llama_linear_tied": linear_config,
    "llama3_biased": llama3_config,
    "mistral": tiny_models.mistral_config,
    "mixtral": tiny_models.mixtral_config,
    "qwen2": tiny_models.qwen2_config,
    "qwen3": tiny_models.qwen3_config,
    "qwen3_yarn": yarn_config,
    "qwen3_moe": qwen3_moe_config,
    "gemma2": gemma2_config,
    "gemma3": gemma3_config,
    "gemma3_multimodal": gemma3_multimodal_config,
    "phi3": tiny_models.phi3_config,
    "phi3_longrope": longrope_config,
    "olmo2": tiny_models.olmo2_config,
    "smollm3": smollm3_config,
}


def open_and_plan(directory: Path) -> tuple[CheckpointReader, FilePlan]:
    """Open a checkpoint and plan its file."""
    reader = open_checkpoint(directory)
    return reader, plan_file(read_structure(reader), reader.config)


def write_plain(
    path: Path,
    reader: TensorSource,
    plan: FilePlan,
    tokenizer: Mapping[str, TypedValue] | None = None,
    kind: str = "F32",
) -> None:
    """Write a planned file, matrices in a plain type and all else in F32."""
    planned = {tensor.gguf_name: tensor for tensor in plan.tensors}
    entries = [
        TensorEntry(t.gguf_name, GGML_TYPES[kind if t.is_matrix else "F32"], t.shape)
        for t in plan.tensors
    ]

    def packed(entry: TensorEntry) -> Tensor:
        tensor = planned[entry.name]
        parts = [reader.read(name).to(torch.float32) for name in tensor.sources]
        return pack_plain(tensor.assemble(parts), entry.type)

    metadata = {
        "general.name": string("tiny"),
        **plan.metadata,
        "general.file_type": uint32(0),
        "general.quantization_version": uint32(2),
        **(tokenizer or {}),
    }
    write_gguf(path, plan.architecture, metadata, entries, packed)
