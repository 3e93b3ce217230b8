"""Everything that is known, and checked, before the first block is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmopt.agreement import Agreement
from llmopt.calibration.hidden_states import file_size
from llmopt.calibration.tokenizer import LoadedTokenizer, load_tokenizer
from llmopt.calibration.walker import TokenBatch, calibration_walker
from llmopt.checkpoint.artifact import Artifact, check_output, check_space, open_artifact
from llmopt.checkpoint.reader import CheckpointReader, open_checkpoint
from llmopt.checkpoint.scan import combined_digest, scan_tensors
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.environment import check_device, describe_environment, fingerprint
from llmopt.errors import BadInputError
from llmopt.evaluation import (
    check_gate,
    check_tasks,
    one_error_family,
    scratch_bytes,
)
from llmopt.progress import Progress
from llmopt.recipe import Recipe, load_recipe
from llmopt.report.schema import Environment
from llmopt.targets import choose_placement, choose_target
from llmopt.targets.base import Target
from llmopt.texts import Texts, check_lengths, prepare_texts

_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that is known before the first block is read."""

    reader: CheckpointReader
    structure: ModelStructure
    recipe: Recipe
    target: Target
    tokenizer: LoadedTokenizer
    texts: Texts
    environment: Environment
    device: str
    digests: dict[str, str]

    @property
    def source_sha256(self) -> str:
        """Content hash of the source: its tensors, and the config that says how they compute."""
        config = json.dumps(self.reader.config, sort_keys=True)
        return combined_digest(
            {**self.digests, "config.json": hashlib.sha256(config.encode()).hexdigest()}
        )


@one_error_family()
def check(
    source: Path | str,
    recipe: Recipe | Path | str,
    output: Path | str,
    *,
    device: str = "cpu",
) -> Agreement:
    """The contract alone, in seconds; ``Agreement.refusals`` says what does not hold.

    No text is read and no weight.

    Raises:
        LlmoptError: the source cannot be opened, the output path is taken, or the recipe names
            something that llmopt does not know or that does not fit the model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _check_paths(Path(source), Path(output), recipe, resume=False)
    check_device(device)
    reader = open_checkpoint(Path(source))
    load_tokenizer(Path(source))
    structure = read_structure(reader)
    check_lengths(recipe, structure.context_length)
    check_tasks(recipe.gate)
    return choose_target(reader, structure, recipe, device).contract


def prepare(
    source: Path,
    recipe: Recipe | Path | str,
    output: Path,
    resume: bool,
    device: str,
    progress: Progress,
    texts: Texts | None = None,
) -> Job:
    """Open, read, check and plan; every bad input that can be told by now is.

    Args:
        source: folder of the checkpoint.
        recipe: a recipe, its name, or its YAML file.
        output: folder that the run will publish.
        resume: whether an interrupted run for it may be there.
        device: where blocks compute.
        progress: told of the source's hashing.
        texts: in place of the recipe's, for a run whose output is judged elsewhere.

    Raises:
        LlmoptError: with what is wrong and what to do.
        EvaluationError: the held-out text cannot be measured on.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _check_paths(source, output, recipe, resume)
    check_device(device)
    reader = open_checkpoint(source)
    structure = read_structure(reader)
    target = choose_target(reader, structure, recipe, device)
    target.contract.enforce()
    tokenizer = load_tokenizer(source)
    if texts is None:
        texts = prepare_texts(recipe, tokenizer.tokenizer, context_length=target.context_length)
        check_gate(
            recipe.gate,
            target.bits,
            texts.evaluation.text,
            recipe.quantized_cache,
            target.context_length,
        )
    walker = calibration_walker(structure, reader, device)
    job = Job(
        reader=reader,
        structure=structure,
        recipe=recipe,
        target=target,
        tokenizer=tokenizer,
        texts=texts,
        environment=describe_environment(device, walker.dtype),
        device=device,
        digests={},
    )
    check_space(output, _needed_bytes(job))
    # Last, for it reads every byte of the source.
    return replace(job, digests=scan_tensors(reader, progress))


def _check_paths(source: Path, output: Path, recipe: Recipe, resume: bool) -> None:
    if recipe.quantize.is_ggml and output.suffix != ".gguf":
        raise BadInputError(
            f"the output {output} is to be a GGUF file, and its name does not end in .gguf",
            f"call it {output.name}.gguf, as llama.cpp and its like look for such files",
        )
    check_output(output, resume=resume, placement=choose_placement(recipe))
    if output.resolve().is_relative_to(source.resolve()):
        raise BadInputError(
            f"the output {output} lies inside the source {source}, which llmopt only reads",
            "choose an output directory outside it",
        )


def stage_artifact(job: Job, output: Path, resume: bool) -> Artifact:
    """Begin the job's output, or go on with an interrupted one; see ``open_artifact``."""
    contents = fingerprint(
        job.environment,
        source=job.source_sha256,
        recipe=job.recipe.sha256(),
        calibration=job.texts.calibration_sha256 + job.target.given_sha256,
    )
    return open_artifact(
        output,
        contents,
        resume=resume,
        needed_bytes=_needed_bytes(job),
        placement=job.target.placement,
    )


def _needed_bytes(job: Job) -> int:
    """Disk space of what is staged and of the largest scratch files."""
    calibration = job.texts.calibration
    hidden = 0
    if calibration is not None:
        dtype = calibration_walker(job.structure, job.reader, job.device).dtype
        shapes = [batch.shape for batch in calibration_batches(calibration.blocks)]
        hidden = 2 * file_size(shapes, job.structure.hidden_size, dtype)
    judging = scratch_bytes(job.texts.evaluation.text, job.recipe.gate, job.structure.hidden_size)
    return job.target.num_bytes + max(hidden, judging)


def calibration_batches(blocks: torch.Tensor) -> list[TokenBatch]:
    """Calibration blocks ``(samples, tokens) int64`` as batches of about 2,048 tokens."""
    rows = max(1, _BATCH_TOKENS // blocks.shape[1])
    names = [f"calibration sample {sample}" for sample in range(len(blocks))]
    return [
        TokenBatch(blocks[first:last].contiguous(), names=tuple(names[first:last]))
        for first in range(0, len(blocks), rows)
        for last in [first + rows]
    ]
