"""What the engines open: the source or its grown form, in INT4, and as GGUF files.

None of it leaves the benchmark, so none of it passes the gate.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmopt.bench.gguf_source import file_metadata
from llmopt.bench.grown_model import grown_label
from llmopt.bench.quantize import calibration_tokens
from llmopt.bench.runners.run_llmopt import given_texts, sized
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.compressing import write_parts
from llmopt.formats.gguf.architectures import plan_file
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.mixtures import find_mixture, tensor_types
from llmopt.formats.gguf.values import string
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.job import prepare, stage_artifact
from llmopt.pipeline import finish
from llmopt.progress import Progress, silent
from llmopt.quantization.ggml.packing import pack_blocks, pack_plain
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.recipe import load_recipe

_CALIBRATION = (32, 512)  # samples, and tokens of each


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model in one kind of weights.

    Attributes:
        path: a checkpoint's folder or a GGUF file.
        read_bytes: of weights that a decode step reads: all but an embedding that is no head.
        is_packed: whether it is a checkpoint whose linear layers are packed.
    """

    path: Path
    read_bytes: int
    is_packed: bool = False


def plain_files(model: Path, dtype: torch.dtype) -> ModelFiles:
    """A checkpoint as it lies there, which engines open in ``dtype``.

    Raises:
        BadInputError: it cannot be opened.
    """
    return ModelFiles(model, checkpoint_read_bytes(model, dtype))


def quantized_files(
    model: Path,
    recipe_name: str,
    folder: Path,
    dtype: torch.dtype,
    progress: Progress = silent,
    tokens: Tensor | None = None,
) -> ModelFiles:
    """The same quantized by a recipe of llmopt, into a folder that does not exist yet.

    Args:
        model: folder of the source.
        recipe_name: of llmopt's, or a path.
        folder: to write.
        dtype: in which engines open what is not quantized.
        progress: told of every block.
        tokens: ``(samples, length) int64`` for a recipe that calibrates, in place of the
            built-in text's.

    Raises:
        LlmoptError: the recipe does not fit the model, or cannot be read.
    """
    recipe = load_recipe(recipe_name)
    if not recipe.calibrates:
        tokens = torch.empty(0, 0, dtype=torch.int64)
    else:
        tokens = calibration_tokens(model, *_CALIBRATION) if tokens is None else tokens
        recipe = sized(recipe, tokens.tolist())
    texts = given_texts(recipe, tokens)
    job = prepare(model, recipe, folder, False, "cpu", progress, texts)
    with stage_artifact(job, folder, resume=False) as artifact:
        write_parts(job, artifact, progress)
        finish(job, artifact, progress)
        os.replace(artifact.directory, folder)
    return ModelFiles(folder, checkpoint_read_bytes(folder, dtype), is_packed=True)


def gguf_files(model: Path, kind: str, path: Path) -> ModelFiles:
    """The same as a GGUF file of one of llama.cpp's kinds, without a tokenizer.

    Raises:
        BadInputError: no such kind, or a model that llama.cpp has no equivalent for.
        StorageError: the disk refuses.
    """
    reader = open_checkpoint(model)
    plan = plan_file(read_structure(reader), reader.config)
    mixture = find_mixture(kind)
    planned = {tensor.gguf_name: tensor for tensor in plan.tensors}
    shapes = [(tensor.gguf_name, tensor.shape) for tensor in plan.tensors]
    types = tensor_types(mixture, plan.facts, shapes, has_importance=False)
    entries = [TensorEntry(name, types[name].type, shape) for name, shape in shapes]

    def packed(entry: TensorEntry) -> Tensor:
        parts = [reader.read(name) for name in planned[entry.name].sources]
        values = planned[entry.name].assemble(parts)
        if entry.type.is_plain:
            return pack_plain(values.float(), entry.type)
        return pack_blocks(quantize_blocks(values, entry.type, search="compatible"))

    # Token ids go in and come out: llama.cpp is told that there is no vocabulary to look for.
    metadata = {**file_metadata(plan, mixture), "tokenizer.ggml.model": string("no_vocab")}
    write_gguf(path, plan.architecture, metadata, entries, packed)
    return ModelFiles(path, gguf_read_bytes(path))


def checkpoint_read_bytes(model: Path, dtype: torch.dtype) -> int:
    """Bytes of all tensors in memory, less the embedding where the head is another.

    Floating-point tensors are opened in ``dtype``; codes and their scales stay as they lie there.
    """
    reader = open_checkpoint(model)
    names = reader.names
    has_head = any(name.startswith("lm_head.") for name in names)

    def opened_bytes(name: str) -> int:
        info = reader.info(name)
        if not info.dtype.is_floating_point or "scale" in name.rpartition(".")[2]:
            return info.num_bytes
        return info.num_parameters * dtype.itemsize

    return sum(
        opened_bytes(name)
        for name in names
        if not (has_head and name.endswith("embed_tokens.weight"))
    )


def gguf_read_bytes(path: Path) -> int:
    """The same of a GGUF file."""
    file = GGUFFile(path)
    has_head = "output.weight" in file.names
    infos = {name: file.info(name) for name in file.names}
    return sum(
        info.row_bytes * (math.prod(info.shape) // info.shape[-1])
        for name, info in infos.items()
        if not (has_head and name == "token_embd.weight")
    )


def model_label(model: Path) -> str:
    """What rows call it: its folder, or what it was grown from."""
    return grown_label(open_checkpoint(model).config) or model.resolve().name
