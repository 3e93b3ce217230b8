"""llama.cpp's importance matrix of a checkpoint, gathered by the walker: one block in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llmopt.calibration.block_pass import advance, gather
from llmopt.calibration.hidden_states import HiddenStatePair, file_size
from llmopt.calibration.statistics import ColumnStatistics
from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.calibration.walker import BlockWalker, calibration_walker
from llmopt.checkpoint.artifact import check_space
from llmopt.checkpoint.durable import storage_errors
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.environment import check_device
from llmopt.errors import BadInputError
from llmopt.evaluation import one_error_family
from llmopt.formats.gguf.architectures.plan import FilePlan, plan_file
from llmopt.formats.gguf.imatrix import ImportanceEntry, ImportanceMatrix, write_imatrix
from llmopt.job import calibration_batches
from llmopt.progress import Progress, silent
from llmopt.recipe import Recipe, load_recipe
from llmopt.targets.gguf.solving import head_statistics
from llmopt.texts import check_lengths, prepare_calibration

DEFAULT_RECIPE = "gguf-q4_k_m"


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was written.

    Attributes:
        path: the file.
        num_entries: weights that have an importance.
        num_tokens: of the calibration text.
        starved: experts that saw no token, by tensor of the file; all their columns count alike.
    """

    path: Path
    num_entries: int
    num_tokens: int
    starved: Mapping[str, int]


@one_error_family()
def gather_imatrix(
    source: Path | str,
    output: Path | str,
    *,
    recipe: Recipe | Path | str = DEFAULT_RECIPE,
    device: str = "cpu",
    progress: Progress = silent,
) -> Gathered:
    """Run a checkpoint over the calibration text and write the mean squares of its inputs.

    The model computes as it is; nothing is quantized and nothing is judged. Of a text of the
    user's own the same part is left out as by ``quantize``, which judges on it.

    Args:
        source: folder of a Hugging Face checkpoint; it is only read.
        output: the file to write; there must be nothing.
        recipe: its calibration section says what to read.
        device: where blocks compute.
        progress: told of every block.

    Raises:
        LlmoptError: with what is wrong and what to do; nothing is at ``output`` then.
    """
    output = Path(output)
    if os.path.lexists(output):
        raise BadInputError(f"output {output} exists", "choose another file")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    check_device(device)
    reader = open_checkpoint(Path(source))
    structure = read_structure(reader)
    plan = plan_file(structure, reader.config)
    check_lengths(recipe, structure.context_length)
    tokenizer = load_tokenizer(Path(source)).tokenizer
    blocks, _ = prepare_calibration(recipe, tokenizer)
    walker = calibration_walker(structure, reader, device)
    batches = calibration_batches(blocks.blocks)
    shapes = [batch.shape for batch in batches]
    check_space(output, 2 * file_size(shapes, structure.hidden_size, walker.dtype))
    output.parent.mkdir(parents=True, exist_ok=True)
    with _scratch_folder(output) as scratch:
        states = HiddenStatePair.create(scratch, shapes, structure.hidden_size, walker.dtype)
        walker.start(batches, states.inputs(0))
        statistics = _walk(walker, states, progress)
    entries = importance_entries(plan, statistics)
    samples, length = blocks.blocks.shape
    matrix = ImportanceMatrix(entries, (recipe.calibration.source,), int(samples), int(length))
    write_imatrix(output, matrix)
    starved = {
        name: unseen
        for name, entry in entries.items()
        if (unseen := int((entry.counts == 0).sum()))
    }
    return Gathered(output, len(entries), int(blocks.blocks.numel()), starved)


@contextmanager
def _scratch_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output``, always of the same name: what a killed run left goes first."""
    scratch = output.parent / f".{output.name}.llmopt-imatrix"
    with storage_errors(f"cannot make {scratch}"):
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _walk(
    walker: BlockWalker, states: HiddenStatePair, progress: Progress
) -> dict[str, ColumnStatistics]:
    """Statistics of every linear layer's input and of the head's, by tensor in the checkpoint."""
    structure = walker.structure
    found: dict[str, ColumnStatistics] = {}
    for block in range(structure.num_blocks):
        progress("gather importance", block, structure.num_blocks)
        inputs, outputs = states.inputs(block), states.outputs(block)
        with walker.materialise(block) as module:
            groups = structure.input_groups(block)
            for group, seen in gather(
                walker, block, module, inputs, groups, ColumnStatistics
            ).items():
                for linear in group:
                    name = f"{structure.block_prefix(block)}.{linear}.weight"
                    found[structure.disk_name(name)] = seen
            advance(walker, block, module, inputs, outputs)
    progress("gather importance", structure.num_blocks, structure.num_blocks)
    found[head_name(structure)] = head_statistics(walker, states.inputs(structure.num_blocks))
    return found


def head_name(structure: ModelStructure) -> str:
    """The tensor in the checkpoint that the head's matrix is read from."""
    name = structure.embed_disk_name if structure.tied_head else structure.head_disk_name
    assert name is not None
    return name


class InputEnergy(Protocol):
    """What an importance is made of: :class:`ColumnStatistics`, or what was kept of it."""

    @property
    def energy(self) -> torch.Tensor:
        """``(in,) float32``, mean squares over the tokens seen."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many they were."""
        ...


def importance_entries(
    plan: FilePlan, statistics: Mapping[str, InputEnergy]
) -> dict[str, ImportanceEntry]:
    """An importance matrix's entries, by tensor of the file.

    Args:
        plan: of the file.
        statistics: by tensor in the checkpoint.
    """
    entries = {}
    for tensor in plan.tensors:
        seen = [statistics[name] for name in tensor.sources if name in statistics]
        if not tensor.is_matrix or not seen:
            continue
        counts = torch.tensor([one.num_tokens for one in seen], dtype=torch.int64)
        sums = torch.stack([one.energy.cpu() for one in seen]) * counts[:, None]
        entries[tensor.gguf_name] = ImportanceEntry(sums, counts)
    return entries
