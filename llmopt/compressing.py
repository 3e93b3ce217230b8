"""The blocks of a job, one after the other: solve, write the shard, journal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.walker import calibration_walker
from llmopt.checkpoint.artifact import Artifact, clear_folder
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.scan import tensor_digest
from llmopt.checkpoint.shards import shard_file_name, write_shard
from llmopt.job import Job, calibration_batches
from llmopt.progress import Progress
from llmopt.rounding import round_block, round_seen_block
from llmopt.scaling import BlockScaling, scale_block
from llmopt.solving import SolvedLinear, solve_block
from llmopt.writing import assemble_part


def write_parts(job: Job, artifact: Artifact, progress: Progress) -> None:
    """One shard a block, journalled; what the journal has is not done again.

    Raises:
        BadInputError: the calibration text starves experts; names them.
        NumericalError: NaN or infinity on the way; names the layer and the sample.
        StorageError: if the disk refuses; what the journal has stays for a resume.
    """
    first = len(artifact.journal.blocks)
    if first == len(job.parts):
        return
    if job.texts.calibration is None:
        _round_parts(job, artifact, first, progress)
    else:
        _solve_parts(job, artifact, first, job.texts.calibration.blocks, progress)
    clear_folder(artifact.scratch)  # the judging needs the room


def _round_parts(job: Job, artifact: Artifact, first: int, progress: Progress) -> None:
    for index, part in enumerate(job.parts[first:], start=first):
        progress("quantize", index, len(job.parts))
        solved: list[SolvedLinear] = []
        if part.block is not None:
            solved = round_block(
                job.structure,
                job.reader,
                part.block,
                job.recipe.quantize,
                job.contract.schemes,
                job.device,
            )
        _write_part(job, artifact, index, solved, BlockScaling())
    progress("quantize", len(job.parts), len(job.parts))


def _solve_parts(
    job: Job, artifact: Artifact, first: int, blocks: torch.Tensor, progress: Progress
) -> None:
    structure, batches = job.structure, calibration_batches(blocks)
    walker = calibration_walker(structure, job.reader, job.device)
    shapes = [batch.shape for batch in batches]
    if 0 < first < structure.num_blocks:
        states = HiddenStatePair.open(artifact.scratch, shapes, structure.hidden_size, walker.dtype)
        walker.resume(batches)
    elif first == 0:
        states = HiddenStatePair.create(
            artifact.scratch, shapes, structure.hidden_size, walker.dtype
        )
        walker.start(batches, states.inputs(0))
    for index, part in enumerate(job.parts[first:], start=first):
        progress("quantize", index, len(job.parts))
        if part.block is None:
            _write_part(job, artifact, index, [], BlockScaling())
            continue
        inputs, outputs = states.inputs(part.block), states.outputs(part.block)
        with (
            walker.materialise(part.block) as module,
            BlockForwards(walker, part.block, module, inputs) as forwards,
        ):
            scaling = _scale(job, forwards)
            solve = round_seen_block
            if job.recipe.quantize.solver == "gptq":
                solve = solve_block
                scaling.statistics.clear()  # it gathers its own; two sets need not fit in memory
            solved = solve(
                forwards,
                job.recipe.quantize,
                job.contract.schemes,
                job.recipe.calibration.min_expert_tokens,
                scaling,
            )
            scaling.statistics.clear()
            forwards.advance(outputs)
        outputs.flush()  # before the journal says that the next block has its inputs
        _write_part(job, artifact, index, solved, scaling)
    progress("quantize", len(job.parts), len(job.parts))


def _scale(job: Job, forwards: BlockForwards) -> BlockScaling:
    if job.recipe.awq is None:
        return BlockScaling()
    return scale_block(
        forwards,
        job.recipe.awq.options(),
        job.contract.schemes,
        job.recipe.calibration.min_expert_tokens,
    )


def _write_part(
    job: Job,
    artifact: Artifact,
    index: int,
    solved: Sequence[SolvedLinear],
    scaling: BlockScaling,
) -> None:
    scaled = {job.structure.disk_name(name): value for name, value in scaling.tensors.items()}
    form = job.contract.form
    written = assemble_part(job.parts[index], job.reader, job.structure, form, solved, scaled)
    shard = write_shard(
        artifact.directory / shard_file_name(index, len(job.parts)), written.tensors
    )
    artifact.journal.append(
        BlockEntry(
            index=index,
            shard=shard,
            digests={linear.module: linear.tensor.digest() for linear in solved},
            payload={
                "layers": [linear.record.model_dump(mode="json") for linear in solved],
                "scales": [record.model_dump(mode="json") for record in scaling.records],
                "declined": [fold.model_dump(mode="json") for fold in scaling.declined],
                "scaled": {name: tensor_digest(value.cpu()) for name, value in scaled.items()},
                "ledger": [entry.model_dump(mode="json") for entry in written.entries],
            },
        )
    )
