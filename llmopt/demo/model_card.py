"""Measure the trained model on the evaluation split and write down what it is."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmopt.calibration.builtin_text import split_sha256, text_fingerprint
from llmopt.calibration.documents import Document
from llmopt.demo.perplexity import perplexity, stream_losses
from llmopt.demo.tokenizer import END_OF_TEXT_ID

BLOCK_LENGTH = 512
LONG_LENGTH = 2048
POSITION_RANGES = ((0, 256), (256, 512), (512, 1024), (1024, 2048))

TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# llmopt demo model

A Llama of {parameters:,} parameters, trained from nothing in less than an hour on two busy CPU
cores. It writes things that look like Python documentation. It is there to be compressed: small
enough to commit, trained well enough that bad quantization shows.

- **Text**: the train split of llmopt's built-in text (`llmopt/calibration/builtin_text.py`): help
  topics and docstrings of CPython {python}, split by a hash of the module's or topic's name, near
  duplicates removed. Hashes: `llmopt/demo/text_hashes.json`. That text is CPython's, under the
  Python Software Foundation License.
- **Training**: {steps} steps, {tokens:,} tokens; sequence length {length}, and {long_length} in
  the last {long_percent:.0f} %; Muon and AdamW in fp32, stored in bf16.
- **Tokenizer**: byte-level BPE of 4,096 entries; `<|endoftext|>` begins and ends; no pad token.

| Held-out perplexity (evaluation split, {evaluation_tokens:,} tokens) | |
|---|---|
| blocks of {block_length} tokens | {perplexity:.2f} |
{position_rows}

Reproduce: `python -m llmopt.demo.train`, with {versions}.
The numbers hold for the text of that Python version; `llmopt.demo.text_drift` tells how far
another one is from it. The last two rows predict the same tokens, after a short and a long context.
"""


def load_demo(folder: Path) -> tuple[PreTrainedModel, Any]:
    """Return the model in fp32 and its tokenizer, from disk."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def document_stream(tokenizer: Any, documents: list[Document]) -> torch.Tensor:
    """Return the ids of all documents, each after an end-of-text token: ``[tokens] int64``."""
    ids: list[int] = []
    for document in documents:
        ids.append(END_OF_TEXT_ID)
        ids.extend(tokenizer(document.text, add_special_tokens=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def blocks_with_bos(stream: torch.Tensor, length: int) -> torch.Tensor:
    """Return the stream cut into ``length - 1`` tokens, each block begun with end-of-text, flat."""
    rows = stream[: len(stream) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.nn.functional.pad(rows, (1, 0), value=END_OF_TEXT_ID).flatten()


def held_out_perplexities(
    model: PreTrainedModel, tokenizer: Any, documents: list[Document]
) -> dict[str, Any]:
    """Return perplexity in short blocks, and by position in long ones."""
    stream = document_stream(tokenizer, documents)
    short = stream_losses(model, blocks_with_bos(stream, BLOCK_LENGTH), BLOCK_LENGTH)
    long_stream = blocks_with_bos(stream, LONG_LENGTH)
    long = stream_losses(model, long_stream, LONG_LENGTH)
    return {
        "documents_sha256": split_sha256(documents),
        "tokens": len(stream),
        "block_length": BLOCK_LENGTH,
        "perplexity": perplexity(short),
        "perplexity_by_position": {
            f"{first}-{last}": perplexity(long[:, first:last]) for first, last in POSITION_RANGES
        },
        "last_tokens": last_tokens_by_context(model, long_stream, long),
    }


def last_tokens_by_context(
    model: PreTrainedModel, stream: torch.Tensor, losses: torch.Tensor
) -> dict[str, float]:
    """Return the perplexity of each long block's last tokens, after short and after long context.

    Perplexity by position compares different text; this compares the same tokens.

    Args:
        model: the model.
        stream: long blocks, flat.
        losses: the model's losses on them, ``[blocks, LONG_LENGTH - 1]``.
    """
    num_last = BLOCK_LENGTH // 2
    ends = stream.view(-1, LONG_LENGTH)[:, -BLOCK_LENGTH:].clone()
    ends[:, 0] = END_OF_TEXT_ID
    after_short = stream_losses(model, ends.flatten(), BLOCK_LENGTH)[:, -num_last:]
    return {
        f"context {num_last}-{BLOCK_LENGTH}": perplexity(after_short),
        f"context {LONG_LENGTH - num_last}-{LONG_LENGTH}": perplexity(losses[:, -num_last:]),
    }


def write_model_card(folder: Path, training: dict[str, Any], documents: list[Document]) -> None:
    """Measure the model in ``folder``; write its ``README.md`` and ``training.json`` beside it.

    Args:
        folder: the saved model.
        training: the plan's fields and the number of training tokens.
        documents: what to measure on; the evaluation split, or a part of it in a test.
    """
    model, tokenizer = load_demo(folder)
    record = {
        "version": 1,
        "training": training,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "python": platform.python_version(),
        "text": text_fingerprint(),
        "held_out": held_out_perplexities(model, tokenizer, documents),
    }
    (folder.parent / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(render_card(record), "utf-8")


def render_card(record: dict[str, Any]) -> str:
    """Return the model card of a training record."""
    training, held_out = record["training"], record["held_out"]
    rows = [
        f"| blocks of {LONG_LENGTH} tokens, positions {positions} | {value:.2f} |"
        for positions, value in held_out["perplexity_by_position"].items()
    ]
    rows += [
        f"| last {BLOCK_LENGTH // 2} tokens of each, {context} | {value:.2f} |"
        for context, value in held_out["last_tokens"].items()
    ]
    return TEMPLATE.format(
        parameters=record["parameters"],
        python=record["python"],
        steps=training["steps"],
        tokens=training["tokens"],
        length=training["length"],
        long_length=LONG_LENGTH,
        long_percent=100 * training["long_share"],
        evaluation_tokens=held_out["tokens"],
        block_length=held_out["block_length"],
        perplexity=held_out["perplexity"],
        position_rows="\n".join(rows),
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    )
