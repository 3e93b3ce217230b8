"""What each choice of a recipe is worth: one choice changed at a time, on one model and one text.

Nothing is gated: what is bad shall be seen to be bad. Every choice is quantized on the same tokens
and measured from its bytes on disk on the same held-out ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmopt.bench.evaluating import Evaluator, Quality, held_out_blocks
from llmopt.bench.runners.run_llmopt import given_texts
from llmopt.checkpoint.durable import storage_errors, write_bytes
from llmopt.compressing import write_parts
from llmopt.contract import Contract
from llmopt.job import Job, prepare, stage_artifact
from llmopt.pipeline import finish
from llmopt.progress import Progress, silent
from llmopt.recipe import Recipe, load_recipe, parse_recipe

BASE = "int4-gptq"


@dataclass(frozen=True, slots=True)
class Choice:
    """A change to the base recipe.

    Attributes:
        label: what the row is called.
        stage: of the quantize stage.
        scheme: of its scheme.
        awq: whether an awq stage goes before it.
    """

    label: str
    stage: Mapping[str, Any] = field(default_factory=dict)
    scheme: Mapping[str, Any] = field(default_factory=dict)
    awq: bool = False


CHOICES: tuple[Choice, ...] = (
    Choice("as it is"),
    Choice("later layers do not see earlier rounding", {"true_sequential": False}),
    Choice("columns from left to right", scheme={"activation_order": "none"}),
    Choice(
        "scales as each group is reached", {"static_groups": False}, {"activation_order": "none"}
    ),
    Choice("ranges not clipped", {"clip": "none"}),
    Choice("clipped by the error of the output", {"clip": "activation"}),
    Choice("damping 0.001", {"damping": 0.001}),
    Choice("damping 0.1", {"damping": 0.1}),
    Choice("scales refined after rounding", {"refine_scales": True}),
    Choice(
        "clipped by the error of the output, refined",
        {"clip": "activation", "refine_scales": True},
    ),
    Choice("AWQ's scaling before it", awq=True),
    Choice("zero points", scheme={"symmetric": False}),
    Choice("zero points, refined", {"refine_scales": True}, {"symmetric": False}),
    Choice("groups of 32", scheme={"group_size": 32}),
    Choice("plain rounding", {"solver": "rtn", "clip": "none"}, {"activation_order": "none"}),
    Choice(
        "plain rounding, clipped by the error of the output",
        {"solver": "rtn", "clip": "activation"},
        {"activation_order": "none"},
    ),
    Choice(
        "the same with AWQ's scaling, symmetric",
        {"solver": "rtn", "clip": "activation"},
        {"activation_order": "none"},
        awq=True,
    ),
    Choice(
        "the same with zero points, refined, as int4-awq",
        {"solver": "rtn", "clip": "activation", "refine_scales": True},
        {"activation_order": "none", "symmetric": False},
        awq=True,
    ),
)


@dataclass(frozen=True, slots=True)
class AblationRow:
    """What became of a choice.

    Attributes:
        label: the choice's.
        bits: on disk a quantized weight, scales and zero points included.
        seconds: to quantize.
        quality: on held-out text.
    """

    label: str
    bits: float
    seconds: float
    quality: Quality


def changed(base: Recipe, choice: Choice) -> Recipe:
    """The recipe with a choice made.

    Raises:
        BadInputError: the choice is none that recipes offer.
    """
    data = base.model_dump(mode="json")
    stage = {**data["stages"][-1], **choice.stage}
    stage["scheme"] = {**stage["scheme"], **choice.scheme}
    scaling = [{"kind": "awq"}] if choice.awq else []
    # Nothing is served, so that no consumer need take it.
    output = {**data["output"], "consumers": []}
    return parse_recipe({**data, "stages": [*scaling, stage], "output": output}, choice.label)


def ablate(
    model: Path,
    tokens: torch.Tensor,
    *,
    choices: Sequence[Choice] = CHOICES,
    held_out_tokens: int = 65_536,
    progress: Progress = silent,
    output: Path | None = None,
) -> list[AblationRow]:
    """Quantize by every choice and measure it.

    Args:
        model: folder of the source.
        tokens: ``(samples, length) int64`` to calibrate on.
        choices: the rows.
        held_out_tokens: to measure on, or a block more.
        progress: told of every row.
        output: Markdown file that holds the rows so far, whatever comes after them.

    Raises:
        LlmoptError: the model cannot be opened, or a choice does not fit it.
        StorageError: a choice's files, or the table, cannot be written.
    """
    base = load_recipe(BASE)
    rows: list[AblationRow] = []
    with tempfile.TemporaryDirectory(prefix="llmopt-ablation-") as scratch:
        folder = Path(scratch)
        evaluate = Evaluator(model, held_out_blocks(model, held_out_tokens), folder)
        for index, choice in enumerate(choices):
            progress("choices", index, len(choices))
            quantized = folder / "output"
            seconds, bits = _quantize(model, changed(base, choice), tokens, quantized)
            rows.append(AblationRow(choice.label, bits, seconds, evaluate(quantized)))
            if output is not None:
                write_bytes(output, markdown_table(rows).encode())
            with storage_errors(f"cannot remove {quantized}"):
                shutil.rmtree(quantized)
    progress("choices", len(choices), len(choices))
    return rows


def _quantize(
    model: Path, recipe: Recipe, tokens: torch.Tensor, output: Path
) -> tuple[float, float]:
    """Seconds it took, and bits a quantized weight on disk."""
    texts = given_texts(recipe, tokens)
    job = prepare(model, recipe, output, False, "cpu", silent, texts)
    with stage_artifact(job, output, resume=False) as artifact:
        started = time.monotonic()
        write_parts(job, artifact, silent)
        finish(job, artifact, silent)
        seconds = time.monotonic() - started
        with storage_errors(f"cannot write {output}"):
            os.replace(artifact.directory, output)
    with storage_errors(f"cannot remove {artifact.staging}"):
        shutil.rmtree(artifact.staging)
    return seconds, _stored_bits(job)


def _stored_bits(job: Job) -> float:
    contract = job.target.contract
    assert isinstance(contract, Contract), "choices are of integer schemes"
    bits = parameters = 0.0
    for name, scheme in contract.schemes.items():
        info = job.reader.info(job.structure.disk_name(f"{name}.weight"))
        rows, columns = info.shape
        share = contract.form.bits_per_weight(scheme, (rows, columns), info.dtype)
        bits += share * info.num_parameters
        parameters += info.num_parameters
    return bits / parameters


def markdown_table(rows: Sequence[AblationRow]) -> str:
    """The rows, KL of the first as the unit of the last column."""
    first = rows[0].quality.kl
    lines = [
        "| choice | bits | KL | perplexity | top-1 | seconds | KL, of the first |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        quality = row.quality
        lines.append(
            f"| {row.label} | {row.bits:.3f} | {quality.kl:.6f} | {quality.perplexity:.3f} "
            f"| {quality.top1:.4f} | {row.seconds:.1f} | {quality.kl / first:.3f} |"
        )
    return "\n".join(lines) + "\n"
