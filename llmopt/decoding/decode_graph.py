"""Decode steps as CUDA graphs: one a batch size, captured at its first use, replayed since.

A step of single tokens is padded to the next size; its numbers are copied into the tensors that
the captured launches read. Without a GPU the same tensors go through the same forward, uncaptured:
so its plumbing is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmopt.decoding.attention.kernels import KernelAttention, Padding, PlaceKey, Plan, plan_step
from llmopt.decoding.kv.store import KVStore
from llmopt.decoding.scheduler import ScheduledChunk

Forward = Callable[[KernelAttention, Tensor, Tensor], Tensor]
"""Attention, token ids and positions ``(1, rows)`` to logits ``(rows, vocabulary)``."""


def refusal(model: nn.Module) -> str | None:
    """Why a model's forward cannot be captured; None where nothing is known against it."""
    for name, module in model.named_modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            return f"{name} chooses its rotary frequencies by the longest position of a step"
        if hasattr(module, "num_experts") and hasattr(module, "gate_up_proj"):
            return f"{name} looks up on the host which experts a step needs"
    return None


def batch_size_for(count: int) -> int:
    """Powers of two up to 8, then multiples of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


@dataclass(slots=True)
class _Captured:
    token_ids: Tensor
    positions: Tensor
    plans: Mapping[PlaceKey, Plan]
    graph: torch.cuda.CUDAGraph | None
    logits: Tensor


class DecodeGraphs:
    """Runs steps in which every sequence has one token.

    Args:
        forward: what is captured.
        store: the pools.
        max_pages: of a sequence.
        device: of the model.
    """

    def __init__(
        self, forward: Forward, store: KVStore, max_pages: int, device: torch.device
    ) -> None:
        self._forward, self._store, self._device = forward, store, device
        config = store.config
        self._max_pages = max_pages
        self._recent_pages = -(-config.recent_window // config.page_size) + 2
        self._captured: dict[int, _Captured] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes that were captured."""
        return tuple(self._captured)

    def takes(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Whether these are decodes, of sequences that fit."""
        limit = self._max_pages * self._store.config.page_size
        return all(chunk.num_tokens == 1 and chunk.start < limit for chunk in chunks)

    def run(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """``(len(chunks), vocabulary)``, overwritten by the next run of this size."""
        size = batch_size_for(len(chunks))
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(size)
        self._fill(captured, chunks, size)
        if captured.graph is not None:
            captured.graph.replay()
        else:
            attention = KernelAttention(self._store, captured.plans)
            captured.logits = self._forward(attention, captured.token_ids, captured.positions)
        return captured.logits[: len(chunks)]

    def _plans(self, chunks: Sequence[ScheduledChunk], size: int) -> dict[PlaceKey, Plan]:
        padding = Padding(size, self._max_pages, self._recent_pages)
        return plan_step(chunks, self._store, padding)

    def _fill(self, captured: _Captured, chunks: Sequence[ScheduledChunk], size: int) -> None:
        padding = [0] * (size - len(chunks))
        token_ids = [chunk.token_ids[0] for chunk in chunks] + padding
        positions = [chunk.start for chunk in chunks] + padding
        captured.token_ids.copy_(torch.tensor([token_ids]), non_blocking=True)
        captured.positions.copy_(torch.tensor([positions]), non_blocking=True)
        for key, plan in self._plans(chunks, size).items():
            captured.plans[key].copy_from(plan)

    def _capture(self, size: int) -> _Captured:
        """Capture a batch of padding alone: it writes nothing and sees nothing."""
        plans = {key: plan.to(self._device) for key, plan in self._plans([], size).items()}
        token_ids, positions = (
            torch.zeros(1, size, dtype=torch.long, device=self._device) for _ in range(2)
        )
        attention = KernelAttention(self._store, plans)
        if self._device.type != "cuda":
            logits = self._forward(attention, token_ids, positions)
            return _Captured(token_ids, positions, plans, None, logits)
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):  # kernels compile and libraries set themselves up
            for _ in range(2):
                self._forward(attention, token_ids, positions)
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # torch's own default is one stream for all captures, on the device of the first.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=stream):
            logits = self._forward(attention, token_ids, positions)
        return _Captured(token_ids, positions, plans, graph, logits)
