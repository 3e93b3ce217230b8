"""llmopt's own quantization of a GGUF file, in a process of its own as llama.cpp's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import gguf  # noqa: F401  (loaded before the clock starts, as in llama.cpp's runner)
import torch
from torch import Tensor

from llmopt.bench.gguf_source import StoredHessians, file_metadata
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.formats.gguf.architectures import plan_file
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.imatrix import ImportanceMatrix, read_imatrix
from llmopt.formats.gguf.mixtures import MIXTURES
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.feedback import gptq_blocks
from llmopt.quantization.ggml.packing import pack_blocks, pack_plain
from llmopt.quantization.ggml.quantize import Search, quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES, GGMLType

PACKAGES = ("llmopt", "gguf")


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Read the F32 file and write the quantized one; statistics are given, as to llama.cpp."""
    reader = open_checkpoint(Path(request["model"]))
    plan = plan_file(read_structure(reader), reader.config)
    mixture = next(m for m in MIXTURES.values() if m.file_type == request["file_type"])
    hessians = StoredHessians(Path(request["hessians"])) if request["method"] == "gptq" else None
    started = time.monotonic()
    source, matrix = GGUFFile(Path(request["source"])), read_imatrix(Path(request["imatrix"]))
    entries = [
        TensorEntry(name, GGML_TYPES[request["types"][name]], source.info(name).shape)
        for name in source.names
    ]

    def packed(entry: TensorEntry) -> Tensor:
        values = source.data(entry.name).view(torch.float32).view(entry.shape)
        if entry.type.is_plain:
            return pack_plain(values, entry.type)
        return _pack(entry, values, matrix, hessians, request["method"])

    output = Path(request["output"])
    write_gguf(output, plan.architecture, file_metadata(plan, mixture), entries, packed)
    return {"quantize_s": time.monotonic() - started}


def _pack(
    entry: TensorEntry,
    values: Tensor,
    matrix: ImportanceMatrix,
    hessians: StoredHessians | None,
    method: str,
) -> Tensor:
    """A tensor's packed rows, ``(matrices, rows, row_bytes) uint8``."""
    parts = values.reshape(-1, *entry.shape[-2:])
    importance = matrix.importance(entry.name, entry.shape)
    by_part = [None] * len(parts) if importance is None else importance.reshape(len(parts), -1)
    found = hessians.of(entry.name) if hessians is not None else ()
    moments = found or [None] * len(parts)
    packed = [
        _pack_matrix(part, entry.type, weights, hessian, method)
        for part, weights, hessian in zip(parts, by_part, moments, strict=True)
    ]
    return torch.stack(packed)


def _pack_matrix(
    weight: Tensor,
    kind: GGMLType,
    importance: Tensor | None,
    hessian: Tensor | None,
    method: str,
) -> Tensor:
    if hessian is not None:
        return pack_blocks(gptq_blocks(weight, hessian, kind, importance=importance).tensor)
    if method == "nearest":
        return pack_blocks(quantize_blocks(weight, kind, search="compatible"))
    # What GPTQ knows no inputs of is rounded: the embedding, the head, experts without tokens.
    search = cast(Search, "least-squares" if method == "gptq" else method)
    return pack_blocks(quantize_blocks(weight, kind, importance=importance, search=search))
