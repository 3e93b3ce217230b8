"""A checkpoint on disk as a scorer: walked block by block, one block in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmopt.calibration.block_pass import advance
from llmopt.calibration.head import Head
from llmopt.calibration.hidden_states import HiddenStatePair, HiddenStates
from llmopt.calibration.walker import BlockWalker, TokenBatch
from llmopt.checkpoint.structure import ModelStructure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.kv_cache.attention import attention_through
from llmopt.kv_cache.reading import KVCache
from llmopt.progress import Progress, silent
from llmopt_evals.scorer import (
    Branches,
    PackedBranches,
    Passage,
    Scores,
    additive_mask,
    pack_branches,
    score_expanded,
    sum_branches,
)

_LOGITS = 1 << 25  # float32 elements of logits in memory at a time, 128 MiB


class WalkerScorer:
    """Scores passages with the weights of ``source``; keeps only the final hidden states.

    Args:
        structure: of the source checkpoint.
        source: weights under the source's names (the checkpoint, or a dequantizing view).
        scratch: directory for hidden states; what is written there goes when the scores go.
        device: where blocks compute.
        tokens_per_batch: tokens that go through a block together; it decides the batch shapes.
        kv_cache: the cache that keys and values are read through; 16 bit without one.
        label: what progress is reported under.
        progress: told of each block.
    """

    def __init__(
        self,
        structure: ModelStructure,
        source: TensorSource,
        scratch: Path,
        *,
        device: str = "cpu",
        tokens_per_batch: int = 4096,
        kv_cache: KVCache | None = None,
        label: str = "score",
        progress: Progress = silent,
    ) -> None:
        self._structure = structure
        self._walker = BlockWalker(structure, source, device)
        self._scratch = scratch
        self._tokens_per_batch = tokens_per_batch
        self._kv_cache = kv_cache
        self._label = label
        self._progress = progress

    def score(self, sequences: Sequence[Passage]) -> Scores:
        """Walk the blocks once over all passages."""
        branches = [passage for passage in sequences if isinstance(passage, Branches)]
        if any(self._must_expand(item) for item in branches):
            return score_expanded(self._walk, sequences)
        return self._walk(sequences)

    def _must_expand(self, item: Branches) -> bool:
        """Whether a branch reads other things when it does not follow its context at once."""
        window = getattr(self._structure.text_config, "sliding_window", None)
        if window and item.longest_path > window:
            return True
        if self._kv_cache is None or self._kv_cache.settings.kind != "int4":
            return False
        # Pages are filled by place in the row: fewer tokens than the window fill none that is read.
        packed = len(item.context) + sum(len(tokens) for tokens in item.continuations)
        return packed > self._kv_cache.settings.recent_window

    def _walk(self, sequences: Sequence[Passage]) -> _WalkedScores:
        rows = [_Row.of(passage) for passage in sequences]
        plan = _plan_batches(rows, self._tokens_per_batch)
        walker, num_blocks = self._walker, self._structure.num_blocks
        batches = [_make_batch([rows[index] for index in batch], walker.dtype) for batch in plan]
        # The files lose their names at once and their space when the scores go.
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            states = HiddenStatePair.create(
                Path(folder),
                [batch.shape for batch in batches],
                self._structure.hidden_size,
                walker.dtype,
            )
        walker.start(batches, states.inputs(0))
        for block in range(num_blocks):
            self._progress(self._label, block, num_blocks)
            with walker.materialise(block) as module, self._reading():
                advance(walker, block, module, states.inputs(block), states.outputs(block))
        self._progress(self._label, num_blocks, num_blocks)
        starts = _row_starts(plan, batches)
        rows_at_once = max(1, _LOGITS // self._structure.vocabulary_size)
        return _WalkedScores(rows, starts, states.inputs(num_blocks), walker.head(), rows_at_once)

    def _reading(self) -> AbstractContextManager[None]:
        if self._kv_cache is None:
            return nullcontext()
        return attention_through(self._structure.skeleton.config, self._kv_cache.see)


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    token_ids: Tensor
    packed: PackedBranches | None

    @staticmethod
    def of(passage: Passage) -> _Row:
        if isinstance(passage, Branches):
            packed = pack_branches(passage)
            return _Row(packed.token_ids, packed)
        return _Row(passage, None)

    @property
    def layout(self) -> tuple[int, ...]:
        """Rows of one layout can share a 4-D mask; plain rows have the empty layout."""
        if self.packed is None:
            return ()
        return (self.packed.first_row, *self.packed.owners.tolist())


def _plan_batches(rows: Sequence[_Row], tokens_per_batch: int) -> list[list[int]]:
    """Indices of rows batch by batch: one layout a batch, similar lengths side by side."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].layout, -len(rows[i].token_ids), i))
    plan: list[list[int]] = []
    for index in order:
        first = rows[plan[-1][0]] if plan else None
        if (
            first is not None
            and first.layout == rows[index].layout
            and (len(plan[-1]) + 1) * len(first.token_ids) <= tokens_per_batch
        ):
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def _make_batch(rows: Sequence[_Row], dtype: torch.dtype) -> TokenBatch:
    # Shorter rows are filled up on the right, where causal attention never looks back from.
    token_ids = torch.nn.utils.rnn.pad_sequence(
        [row.token_ids for row in rows], batch_first=True, padding_value=0
    )
    packed = rows[0].packed
    if packed is None:
        return TokenBatch(token_ids)
    positions = packed.position_ids.expand(len(rows), -1).contiguous()
    return TokenBatch(token_ids, positions, additive_mask(packed.mask, dtype))


def _row_starts(plan: Sequence[Sequence[int]], batches: Sequence[TokenBatch]) -> dict[int, int]:
    starts: dict[int, int] = {}
    total = 0
    for indices, batch in zip(plan, batches, strict=True):
        for place, index in enumerate(indices):
            starts[index] = total + place * batch.shape[1]
        total += batch.shape[0] * batch.shape[1]
    return starts


class _WalkedScores:
    def __init__(
        self,
        rows: Sequence[_Row],
        starts: dict[int, int],
        states: HiddenStates,
        head: Head,
        rows_at_once: int,
    ) -> None:
        self._rows = rows
        self._starts = starts
        self._states = states
        self._head = head
        self._rows_at_once = rows_at_once

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        first = self._starts[sequence]
        return self._head.logits(self._states.tokens(first + start, first + stop))

    def branch_logprobs(self, sequences: Sequence[int]) -> list[Tensor]:
        sums: list[Tensor] = []
        waiting: list[tuple[PackedBranches, Tensor]] = []
        num_waiting = 0
        for sequence in sequences:
            packed = self._rows[sequence].packed
            assert packed is not None, "a plain sequence has no branches"
            first = self._starts[sequence]
            hidden = self._states.tokens(first + packed.first_row, first + len(packed.token_ids))
            waiting.append((packed, hidden))
            num_waiting += len(hidden)
            if num_waiting >= self._rows_at_once:
                sums += self._sum(waiting)
                waiting, num_waiting = [], 0
        return sums + self._sum(waiting)

    def _sum(self, waiting: Sequence[tuple[PackedBranches, Tensor]]) -> list[Tensor]:
        if not waiting:
            return []
        logits = self._head.logits(torch.cat([hidden for _, hidden in waiting]))
        parts = torch.split_with_sizes(logits, [len(hidden) for _, hidden in waiting])
        return [
            sum_branches(packed, part) for (packed, _), part in zip(waiting, parts, strict=True)
        ]
