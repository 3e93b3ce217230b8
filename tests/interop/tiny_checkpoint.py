"""A small random Llama and its quantized copies, for asking a consumer what it accepts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt.formats.base import Format
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
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    # GPTQModel opens no directory that lacks one.
    words = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return folder


def write_quantized(
    dense: Path, form: Format, schemes: Mapping[str, Scheme | None], folder: Path
) -> Path:
    """Write a copy of ``dense`` with linear layers rounded and packed; ``None`` keeps a layer."""

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        scheme = schemes[module]
        if scheme is None:
            return {f"{module}.weight": weight}
        return form.pack(module, quantize(weight, scheme))

    _write(dense, folder, pack)
    packed = {module: scheme for module, scheme in schemes.items() if scheme is not None}
    kept = [module for module, scheme in schemes.items() if scheme is None]
    told = form.config(packed, [*kept, "lm_head"])
    config = json.loads((dense / "config.json").read_text("utf-8"))
    for name, content in form.companion_files(told).items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    config["quantization_config"] = told
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def write_rounded(
    dense: Path,
    schemes: Mapping[str, Scheme | None],
    folder: Path,
    *,
    round_to_scale_dtype: bool = False,
) -> Path:
    """Write what :func:`write_quantized` means, unpacked.

    A consumer that dequantizes on loading rounds each weight to the element type of the scales; one
    that keeps the codes multiplies exactly.
    """

    def dequantize(module: str, weight: Tensor) -> dict[str, Tensor]:
        scheme = schemes[module]
        if scheme is None:
            return {f"{module}.weight": weight}
        tensor = quantize(weight, scheme)
        dtype = tensor.scales.dtype if round_to_scale_dtype else torch.float32
        return {f"{module}.weight": tensor.dequantize(dtype)}

    _write(dense, folder, dequantize)
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


def linear_modules(dense: Path) -> list[str]:
    """Every linear layer of the blocks."""
    tensors = load_file(dense / "model.safetensors")
    return [name.removesuffix(".weight") for name in tensors if _is_linear(name)]


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _write(dense: Path, folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        kept = {name: tensor}
        tensors |= change(name.removesuffix(".weight"), tensor) if _is_linear(name) else kept
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
