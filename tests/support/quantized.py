"""Random checkpoints on disk in any format, packed without the pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.small_jobs import write_tokenizer
from support.tiny_models import llama_config, write_checkpoint

from llmopt.formats.base import Format
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme
from llmopt.writing import write_config

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1}


def random_tensor(
    scheme: Scheme, shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """Codes, scales, zero points from 1 up and, where the scheme asks, a random group index."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    per_group = scheme.columns_per_group(columns)
    groups = columns // per_group

    def integers(low: int, *size: int) -> torch.Tensor:
        return torch.randint(low, scheme.max_code + 1, size, generator=generator).to(torch.uint8)

    order = torch.randperm(columns, generator=generator).to(torch.int32)
    return QuantizedTensor(
        codes=integers(0, rows, columns),
        scales=(torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).to(dtype),
        zero_points=None if scheme.symmetric else integers(1, rows, groups),
        group_index=order // per_group if scheme.activation_order == "group" else None,
        scheme=scheme,
    )


def write_quantized(
    folder: Path,
    form: Format,
    scheme_of: Callable[[str], Scheme | None],
    *,
    config: Any = None,
    ignored: tuple[str, ...] = ("lm_head",),
    change: Callable[[QuantizedTensor], QuantizedTensor] = lambda tensor: tensor,
    dtype: torch.dtype = torch.float16,
    endings: tuple[str, ...] = ("proj.weight",),
) -> dict[str, QuantizedTensor]:
    """Write a random Llama with random codes in ``form``; the codes by module name.

    Tensors whose names have one of ``endings`` are linear layers' weights.
    """
    write_checkpoint(folder, config or llama_config(vocab_size=512, **WIDTHS), dtype=dtype)
    write_tokenizer(folder)
    tensors, written = load_file(folder / "model.safetensors"), {}
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        scheme = scheme_of(module) if name.endswith(endings) else None
        if scheme is None:
            continue
        shape = tensors.pop(name).shape
        tensor = random_tensor(scheme, (shape[0], shape[1]), seed=len(written), dtype=dtype)
        written[module] = change(tensor)
        tensors |= form.pack(module, written[module])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = json.loads((folder / "config.json").read_text("utf-8"))
    schemes = {module: tensor.scheme for module, tensor in written.items()}
    write_config(folder, source, form, form.config(schemes, ignored))
    return written


def with_midpoints(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same codes, the middle of the range for every zero point, said out loud."""
    middle = torch.full(tensor.scales.shape, tensor.scheme.midpoint, dtype=torch.uint8)
    scheme = dataclasses.replace(tensor.scheme, symmetric=False)
    return dataclasses.replace(tensor, zero_points=middle, scheme=scheme)
