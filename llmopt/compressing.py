"""The blocks of a job, one after the other: solve, write the shard, journal."""

from __future__ import annotations

import torch

from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.walker import calibration_walker
from llmopt.checkpoint.artifact import Artifact, clear_folder
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.shards import shard_file_name, write_shard
from llmopt.job import Job, calibration_batches
from llmopt.progress import Progress
from llmopt.targets.base import CompressedPart, Seen


def write_parts(job: Job, artifact: Artifact, progress: Progress) -> None:
    """One shard a block, journalled; what the journal has is not done again.

    Raises:
        BadInputError: the calibration text starves experts; names them.
        NumericalError: NaN or infinity on the way; names the layer and the sample.
        StorageError: if the disk refuses; what the journal has stays for a resume.
    """
    first = len(artifact.journal.blocks)
    if first == len(job.target.parts):
        return
    if job.texts.calibration is None:
        _round_parts(job, artifact, first, progress)
    else:
        _solve_parts(job, artifact, first, job.texts.calibration.blocks, progress)
    clear_folder(artifact.scratch)  # the judging needs the room


def _round_parts(job: Job, artifact: Artifact, first: int, progress: Progress) -> None:
    parts = job.target.parts
    for index, part in enumerate(parts[first:], start=first):
        progress("quantize", index, len(parts))
        _write_part(job, artifact, index, job.target.compress(part, None))
    progress("quantize", len(parts), len(parts))


def _solve_parts(
    job: Job, artifact: Artifact, first: int, blocks: torch.Tensor, progress: Progress
) -> None:
    structure, batches, parts = job.structure, calibration_batches(blocks), job.target.parts
    walker = calibration_walker(structure, job.reader, job.device)
    shapes = [batch.shape for batch in batches]
    if first:
        states = HiddenStatePair.open(artifact.scratch, shapes, structure.hidden_size, walker.dtype)
        walker.resume(batches)
    else:
        states = HiddenStatePair.create(
            artifact.scratch, shapes, structure.hidden_size, walker.dtype
        )
        walker.start(batches, states.inputs(0))
    for index, part in enumerate(parts[first:], start=first):
        progress("quantize", index, len(parts))
        if part.block is None:
            seen = Seen(walker, states.inputs(structure.num_blocks), None)
            _write_part(job, artifact, index, job.target.compress(part, seen))
            continue
        inputs, outputs = states.inputs(part.block), states.outputs(part.block)
        with (
            walker.materialise(part.block) as module,
            BlockForwards(walker, part.block, module, inputs) as forwards,
        ):
            written = job.target.compress(part, Seen(walker, inputs, forwards))
            forwards.advance(outputs)
        outputs.flush()  # before the journal says that the next block has its inputs
        _write_part(job, artifact, index, written)
    progress("quantize", len(parts), len(parts))


def _write_part(job: Job, artifact: Artifact, index: int, part: CompressedPart) -> None:
    file = shard_file_name(index, len(job.target.parts))
    shard = write_shard(artifact.shards / file, part.tensors)
    artifact.journal.append(
        BlockEntry(
            index=index,
            shard=shard,
            digests=dict(part.digests),
            payload={
                **part.payload,
                "layers": [record.model_dump(mode="json") for record in part.layers],
                "ledger": [entry.model_dump(mode="json") for entry in part.entries],
            },
        )
    )
