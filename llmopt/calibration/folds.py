"""Which channels of a decoder block can be rescaled without changing it, found by watching.

A producer (a norm, rows of a linear layer) is multiplied by random powers of two, channel by
channel. Every reader whose input follows channel by channel could take that back in its columns;
its input is put back as it was, so that what comes after is undisturbed. If then the block's output
is as before, all readers were found and rescaling is exact. No architecture is named anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmopt.calibration.probing import (
    Baseline,
    Run,
    in_float32,
    norm_offset,
    probe,
    random_factors,
    role_of,
    watch_run,
)


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Channels that a scale can be folded into. Modules are named relative to the block.

    Attributes:
        producer: a norm, or a linear layer.
        first_row: the first of the linear layer's rows that are the channels.
        num_channels: how many channels.
        norm_offset: a norm multiplies by ``norm_offset + weight``; None for a linear layer.
        readers: every module whose weight ``(out, in)`` takes the channels up.
        channels: ``(in,) int64``, the channel of each of the readers' columns.
    """

    producer: str
    first_row: int
    num_channels: int
    norm_offset: float | None
    readers: tuple[str, ...]
    channels: Tensor


@dataclass(frozen=True, slots=True)
class Declined:
    """A producer (``*`` for the index of an expert) that no scale can be folded into, and why."""

    producer: str
    reason: str


@torch.no_grad()
def find_folds(block: nn.Module, run: Run) -> tuple[list[Fold], list[Declined]]:
    """Find every exact rescaling in a decoder block.

    Args:
        block: with its weights, in any element type; they are as before when this returns.
        run: runs the block, whose weights are in float32 then, on a few tokens, the same ones each
            time, and returns its output.
    """
    with in_float32(block), _every_token(block):
        baseline = watch_run(block, run)
        folds: list[Fold] = []
        declined: list[Declined] = []
        claimed: dict[str, str] = {}
        for role, producers in baseline.roles().items():
            found = _find_of_role(block, run, baseline, producers)
            if isinstance(found, str):
                declined.append(Declined(role, found))
                continue
            taken = next((r for fold in found for r in fold.readers if r in claimed), None)
            if taken is not None:
                reason = f"{role_of(taken)} is scaled through {claimed[taken]} already"
                declined.append(Declined(role, reason))
                continue
            claimed.update({reader: role for fold in found for reader in fold.readers})
            folds += found
    return folds, declined


@contextmanager
def _every_token(block: nn.Module) -> Iterator[None]:
    """Let every expert see every token, so that none of them is passed over."""
    experts = [module for module in block.modules() if hasattr(module, "every_token")]
    before = [module.every_token for module in experts]
    for module in experts:
        module.every_token = True  # type: ignore[assignment]  # nn.Module types all as tensors
    try:
        yield
    finally:
        for module, value in zip(experts, before, strict=True):
            module.every_token = value


def _find_of_role(
    block: nn.Module, run: Run, baseline: Baseline, producers: Sequence[str]
) -> list[Fold] | str:
    """The folds of producers of one role, or why there are none."""
    module, position = baseline.producers[producers[0]]
    offset: float | None = None
    if not isinstance(module, nn.Linear):
        offset = norm_offset(module, baseline.inputs[producers[0]])
        if offset is None:
            return "its output is not a multiple of its weight"
    size = _width(module)
    slices = [(0, size)] if offset is not None else _slices(size, baseline, position)
    reason = "no later layer has a matching number of columns"
    for first, count in slices:
        generator = torch.Generator().manual_seed(len(producers) + count)
        factors = {path: random_factors(count, generator).to(baseline.output) for path in producers}
        found = probe(block, run, baseline, factors, first)
        if isinstance(found, str):
            reason = found
            continue
        return [
            Fold(path, first, count, offset, readers, channels)
            for path, (readers, channels) in found.items()
        ]
    return reason


def _width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _slices(rows: int, baseline: Baseline, position: int) -> list[tuple[int, int]]:
    """Row slices ``(first, count)`` to try: all, what follows a gate, or query and key."""
    later = list(baseline.readers)[position:]
    widths = dict.fromkeys(baseline.inputs[path].shape[-1] for path in later)
    counts = [rows] if any(width % rows == 0 for width in widths) else []
    counts += [width for width in widths if width < rows]
    for width in widths:
        half, rest = divmod(rows - width, 2)
        if rest == 0 and half > 0 and width % half == 0:
            counts.append(half)
    return [(rows - count, count) for count in dict.fromkeys(counts)]
