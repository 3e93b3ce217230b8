"""Open what llmopt published as a transformers model whose linear layers stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmopt.checkpoint.materialise import initialise_buffers
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.checkpoint.tensor_names import ConfiguredSource
from llmopt.errors import BadInputError
from llmopt.formats.dequantized import DequantizedSource
from llmopt.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a quantized checkpoint for inference: ``model.generate`` and ``model(input_ids)`` work.

    Weights stay packed: a 4-bit model takes about a quarter of its 16-bit memory, embeddings
    aside. Of a multimodal wrapper the text model is loaded.

    Args:
        directory: what ``llmopt quantize`` wrote, or another weight-only checkpoint in a
            format that llmopt reads.
        device: where the model lives. On a GPU its 4- and 8-bit layers take the layout of the
            Triton kernel as they arrive there.
        dtype: of activations and of what is not quantized; ``None`` is the checkpoint's own. On a
            CPU bfloat16 is the fast one: torch's int4 kernel is slow for the others. On a GPU the
            Triton kernel takes bfloat16 and float16.

    Raises:
        BadInputError: not such a checkpoint, a damaged one, or a dtype that is not served.
    """
    directory = Path(directory)
    source = DequantizedSource(open_checkpoint(directory))
    return _build(source, frozenset(source.quantized_modules), directory, device, dtype)


def load_dense(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a checkpoint that is not quantized, as :func:`load` loads one that is.

    A tensor that is missing or of another shape is an error, where transformers would draw one at
    random and say so in a log.

    Args:
        directory: of a Hugging Face checkpoint.
        device: where the model lives.
        dtype: of its weights; ``None`` is the checkpoint's own.

    Raises:
        BadInputError: not such a checkpoint, a damaged one, or a dtype that is not served.
    """
    directory = Path(directory)
    return _build(open_checkpoint(directory), frozenset(), directory, device, dtype)


def _build(
    source: ConfiguredSource,
    quantized: frozenset[str],
    directory: Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """The model of ``source``, linear layers of the modules in ``quantized`` packed."""
    if dtype is not None and dtype not in DTYPES:
        raise BadInputError(
            f"dtype {dtype} is not served", f"use one of {', '.join(map(str, DTYPES))}"
        )
    structure = read_structure(source)
    model = structure.skeleton
    dtype = dtype or _own_dtype(structure, source)
    initialise_buffers(model, model, device)
    for name, module in list(model.named_modules()):
        disk_name = structure.disk_names.get(f"{name}.weight", "").removesuffix(".weight")
        if isinstance(module, nn.Linear) and disk_name in quantized:
            bias_name = structure.disk_names.get(f"{name}.bias")
            bias = None if bias_name is None else source.read(bias_name)
            assert isinstance(source, DequantizedSource)
            tensor = source.read_quantized(disk_name)
            model.set_submodule(name, QuantizedLinear(tensor, bias, dtype, device))
    for name, disk_name in structure.disk_names.items():
        owner, _, key = name.rpartition(".")
        if not isinstance(model.get_submodule(owner), QuantizedLinear):
            _assign(model.get_submodule(owner), key, source.read(disk_name), device, dtype)
    if structure.tied_head:
        head = model.get_submodule(structure.anatomy.head)
        head.weight = model.get_submodule(structure.anatomy.embedding).weight
    model.config.dtype = dtype
    _read_generation_config(model, directory)
    return model


def _own_dtype(structure: ModelStructure, source: ConfiguredSource) -> torch.dtype:
    return source.info(structure.embed_disk_name).dtype


def _assign(
    owner: nn.Module, key: str, value: Tensor, device: str | torch.device, dtype: torch.dtype
) -> None:
    # A copy: a view of the mapped file would follow whatever happens to the file.
    moved = value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if key in owner._buffers:
        owner._buffers[key] = moved
    else:
        owner.register_parameter(key, nn.Parameter(moved, requires_grad=False))


def _read_generation_config(model: PreTrainedModel, directory: Path) -> None:
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(directory)
