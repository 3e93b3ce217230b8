"""A small random Llama and its quantized copies, for asking a consumer what it accepts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt.formats import FORMATS
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme

HIDDEN = 256
VOCABULARY = 512
PROMPTS = tuple(
    tuple(torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (90, 41)
)


def write_dense(folder: Path) -> Path:
    """Write the unquantized model in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.06,  # large enough for rounding to show in the log-probabilities
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_quantized(dense: Path, scheme: Scheme, folder: Path) -> Path:
    """Write a copy of ``dense`` with every block's linear layers rounded and packed."""
    form = FORMATS["compressed-tensors"]

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        return form.pack(module, quantize(weight, scheme))

    _write(dense, folder, pack)
    tensors = load_file(dense / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in tensors if is_linear(name)]
    config = json.loads((dense / "config.json").read_text("utf-8"))
    config["quantization_config"] = form.config(dict.fromkeys(modules, scheme), ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def write_rounded(dense: Path, scheme: Scheme, folder: Path, *, round_to_scale_dtype: bool) -> Path:
    """Write what :func:`write_quantized` means, unpacked.

    A consumer that dequantizes on loading rounds each weight to the element type of the scales; one
    that keeps the codes multiplies exactly.
    """

    def dequantize(module: str, weight: Tensor) -> dict[str, Tensor]:
        tensor = quantize(weight, scheme)
        dtype = tensor.scales.dtype if round_to_scale_dtype else torch.float32
        return {f"{module}.weight": tensor.dequantize(dtype)}

    _write(dense, folder, dequantize)
    (folder / "config.json").write_bytes((dense / "config.json").read_bytes())
    return folder


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Plain rounding; the order ``group`` forms the groups along a fixed permutation."""
    if scheme.activation_order != "group":
        return rtn(weight, scheme, scale_dtype=torch.bfloat16)
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    plain = dataclasses.replace(scheme, activation_order="none")
    permuted = rtn(weight[:, order], plain, scale_dtype=torch.bfloat16)
    codes = torch.empty_like(permuted.codes)
    codes[:, order] = permuted.codes
    group_index = torch.empty(columns, dtype=torch.int32)
    group_index[order] = permuted.column_groups().int()
    return dataclasses.replace(permuted, codes=codes, group_index=group_index, scheme=scheme)


def is_linear(name: str) -> bool:
    """Whether the tensor is the weight of a linear layer in a block."""
    return name.endswith("_proj.weight")


def _write(dense: Path, folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        kept = {name: tensor}
        tensors |= change(name.removesuffix(".weight"), tensor) if is_linear(name) else kept
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
