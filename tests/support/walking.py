"""Helpers that walk a checkpoint for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from support.tiny_models import VOCABULARY
from torch import Tensor

from llmopt.calibration.block_pass import advance
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.walker import BlockWalker, TokenBatch
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure


def random_batch(rows: int, tokens: int, seed: int = 0) -> TokenBatch:
    """Random token ids, without the ids that Gemma 3's wrapper takes for images."""
    generator = torch.Generator().manual_seed(seed)
    return TokenBatch(torch.randint(VOCABULARY - 3, (rows, tokens), generator=generator))


def open_walker(directory: Path, dtype: torch.dtype | None = None) -> BlockWalker:
    """A walker on the CPU over the checkpoint in `directory`, in float32 unless told."""
    reader = open_checkpoint(directory)
    return BlockWalker(read_structure(reader), reader, dtype=dtype)


def walk(
    walker: BlockWalker, batches: Sequence[TokenBatch], directory: Path
) -> tuple[list[list[Tensor]], HiddenStatePair]:
    """Walk all blocks: [block][batch] inputs, those of the final norm last; and the files."""
    shapes = [batch.shape for batch in batches]
    states = HiddenStatePair.create(directory, shapes, walker.structure.hidden_size, walker.dtype)
    walker.start(batches, states.inputs(0))
    inputs = []
    for block in range(walker.structure.num_blocks):
        given = states.inputs(block)
        inputs.append([given.read(index) for index in range(len(batches))])
        with walker.materialise(block) as module:
            advance(walker, block, module, given, states.outputs(block))
    final = states.inputs(walker.structure.num_blocks)
    inputs.append([final.read(index) for index in range(len(batches))])
    return inputs, states
