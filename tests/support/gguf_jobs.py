"""Jobs for GGUF files: widths that super-blocks divide, recipes of GGUF types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.small_jobs import small_recipe, write_job

from llmopt.recipe import Recipe

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def write_wide_job(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A random checkpoint of two blocks, every row of it a whole super-block."""
    return write_job(folder, architecture, **{**WIDTHS, "num_hidden_layers": 2, **changes})


def gguf_recipe(text: Path | str, kind: str = "Q4_K_M", **changes: Any) -> Recipe:
    """Rounding to a GGUF type, with margins that random weights can keep; ``stage`` is merged."""
    stage = {"solver": "rtn", "scheme": {"type": kind}, **changes.pop("stage", {})}
    output = {"format": "gguf", **changes.pop("output", {})}
    return small_recipe(text, stages=[stage], output=output, **changes)
