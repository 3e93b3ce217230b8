"""Jobs that finish in a second or two: a tiny checkpoint with a tokenizer, a text, a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.tiny_models import CONFIGS, write_checkpoint

from llmopt.recipe import Recipe, parse_recipe

VOCAB_SIZE = 512


def write_job(
    folder: Path,
    architecture: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "10GB",
    **changes: Any,
) -> Path:
    """A random checkpoint of an architecture with widths that groups of 32 divide."""
    source = folder / "source"
    widths = {"vocab_size": VOCAB_SIZE, "intermediate_size": 64}
    if architecture == "qwen3_moe":
        widths["moe_intermediate_size"] = 32
    config = CONFIGS[architecture](**{**widths, **changes})
    write_checkpoint(source, config, dtype=dtype, max_shard_size=max_shard_size)
    write_tokenizer(source)
    return source


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of ``VOCAB_SIZE`` entries, without a pad token."""
    from llmopt.demo.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer([make_text(20, seed=9)], VOCAB_SIZE), folder, 2048)


def make_text(num_paragraphs: int, seed: int = 0) -> str:
    """Paragraphs of about seven hundred characters, no two alike, a blank line between them."""
    generator = torch.Generator().manual_seed(seed)
    syllables = ["ka", "to", "mi", "re", "su", "no", "la", "vi", "do", "pe", "qua", "zin"]

    def word() -> str:
        picks = torch.randint(len(syllables), (3,), generator=generator).tolist()
        return "".join(syllables[pick] for pick in picks)

    return "\n\n".join(" ".join(word() for _ in range(140)) for _ in range(num_paragraphs))


def write_text(folder: Path, num_paragraphs: int = 90) -> Path:
    """A text whose held-out half is enough for the gate's thirty units."""
    path = folder / "text.txt"
    path.write_text(make_text(num_paragraphs), encoding="utf-8")
    return path


def small_recipe(text: Path | str, **changes: Any) -> Recipe:
    """INT4 GPTQ in groups of 32 on little text, with margins that random weights can keep.

    ``changes`` replace whole sections; ``stage``, ``gate`` and its margins are merged into theirs.
    """
    stage = {
        "solver": "gptq",
        "scheme": {"bits": 4, "group_size": 32},
        **changes.pop("stage", {}),
    }
    gate = changes.pop("gate", {})
    margins = {
        "perplexity_ratio": 9.0,
        "mean_kl": 9.0,
        "p99_kl": 90.0,
        "top1_agreement": 0.0,
        "cloze_accuracy_drop": 1.0,
        **gate.get("margins", {}),
    }
    gate = {
        "relative": None,
        "looks": 1,
        "cloze": {"num_items": 40, "context_tokens": 8, "continuation_tokens": 4},
        **gate,
        "margins": margins,
    }
    data = {
        "name": "small",
        "stages": [stage],
        "calibration": {"source": str(text), "num_samples": 6, "sequence_length": 64},
        "evaluation": {"sources": [], "own_text_share": 0.5},
        "output": {"consumers": ["transformers"]},
        "gate": gate,
        **changes,
    }
    return parse_recipe(data)
