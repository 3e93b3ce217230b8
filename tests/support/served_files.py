"""GGUF files small enough to plan a server for: metadata and one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llmopt.formats.gguf.record import set_verdict
from llmopt.formats.gguf.values import TypedValue, string, uint32
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.types import GGML_TYPES


def write_served_file(
    folder: Path,
    outcome: str | None = "pass",
    *,
    context: int = 4096,
    changes: Mapping[str, TypedValue | None] | None = None,
) -> Path:
    """A file with a verdict (none without an outcome); a change of ``None`` leaves a key out."""
    metadata: dict[str, TypedValue | None] = {
        "llama.context_length": uint32(context),
        "llama.embedding_length": uint32(64),
        "llama.block_count": uint32(3),
        "llama.attention.head_count": uint32(8),
        "llama.attention.head_count_kv": uint32(2),
        "tokenizer.chat_template": string("{{ messages }}"),
        **(changes or {}),
    }
    written = {key: value for key, value in metadata.items() if value is not None}
    entry = TensorEntry("token_embd.weight", GGML_TYPES["F32"], (7, 64))
    path = folder / "model.gguf"
    write_gguf(path, "llama", written, [entry], lambda _: torch.zeros(7, 256, dtype=torch.uint8))
    if outcome is not None:
        set_verdict(path, {"outcome": outcome})
    return path
