"""How searches see a weight: sub-blocks side by side, the weights of one below each other.

Tensors are ``(sub_block, sub_blocks, blocks)``: reductions over a sub-block then run over the first
dimension and scales broadcast along it, both over long contiguous runs whatever the type. The last
dimension counts the blocks of all rows, row after row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import NumericalError
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.ggml.types import GGMLType

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found for some blocks.

    Attributes:
        codes: ``(sub_block, sub_blocks, blocks)``, whole numbers of any type.
        scales: ``(blocks,) float32``, rounded to float16 when stored.
        sub_scales: ``(sub_blocks, blocks) float32`` whole numbers, ``None`` where blocks are uncut.
        mins: like ``scales``, or ``None``.
        sub_mins: like ``sub_scales``, or ``None``.
    """

    codes: Tensor
    scales: Tensor
    sub_scales: Tensor | None = None
    mins: Tensor | None = None
    sub_mins: Tensor | None = None


def to_columns(rows: Tensor, kind: GGMLType) -> Tensor:
    """``rows (rows, in)`` as ``(sub_block, sub_blocks, blocks) float32``, a copy."""
    cut = rows.reshape(-1, kind.sub_blocks, kind.sub_block).permute(2, 1, 0)
    return cut.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def importance_columns(importance: Tensor, kind: GGMLType, rows: int) -> Tensor:
    """``importance (in,)`` of each weight of ``rows`` rows, laid out as ``to_columns`` does."""
    return to_columns(importance.unsqueeze(0).expand(rows, -1), kind)


def to_tensor(found: Found, kind: GGMLType, rows: int) -> GGMLTensor:
    """What was found for whole rows, as it is stored.

    Raises:
        NumericalError: if a scale or minimum is beyond what float16 holds.
    """
    codes = found.codes.to(torch.uint8).permute(2, 1, 0).reshape(rows, -1)

    def whole(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.to(torch.int16).t().reshape(rows, -1)

    return GGMLTensor(
        type=kind,
        codes=codes,
        scales=to_float16(found.scales, kind).view(rows, -1),
        sub_scales=whole(found.sub_scales),
        mins=None if found.mins is None else to_float16(found.mins, kind).view(rows, -1),
        sub_mins=whole(found.sub_mins),
    )


def to_float16(values: Tensor, kind: GGMLType) -> Tensor:
    """Scales as they are stored; raises NumericalError where float16 is too narrow."""
    stored = values.half()
    if not bool(stored.isfinite().all()):
        raise NumericalError(
            f"a scale or minimum of {float(values.abs().max()):g} is beyond the float16 that "
            f"{kind.name} stores it in",
            "store this tensor as BF16 or F32",
        )
    return stored


def through_float16(values: Tensor) -> Tensor:
    """What is left of ``values`` once stored."""
    return values.half().float()


def quotient(numerator: float | Tensor, denominator: float | Tensor) -> Tensor:
    """``numerator / denominator`` as IEEE has it.

    torch multiplies by a reciprocal where one of the two is a plain number (the numerator anywhere,
    the denominator on GPUs), which rounds twice.
    """
    of = numerator if isinstance(numerator, Tensor) else denominator
    assert isinstance(of, Tensor)
    parts = [
        part if isinstance(part, Tensor) else of.new_tensor(part)
        for part in (numerator, denominator)
    ]
    return torch.div(*parts)


def reciprocal(values: Tensor) -> Tensor:
    """``1 / values``, and 0 where that would be no number."""
    return torch.where(values.abs() < _SMALLEST_NORMAL, 0.0, 1 / values)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is not positive."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)


def signed_peak(values: Tensor) -> Tensor:
    """The first value of largest magnitude along dimension 0, with its sign."""
    peak = torch.zeros_like(values[0])
    size = torch.zeros_like(peak)
    for value in values:
        magnitude = value.abs()
        peak = torch.where(magnitude > size, value, peak)
        size = torch.maximum(size, magnitude)
    return peak


def codebook_table(kind: GGMLType, device: torch.device) -> Tensor:
    """The nearest code by ``floor(2 * value) + 256``, ``(512,) uint8``; of two, the upper.

    Exact, because the midpoints between two levels of a codebook are multiples of a half.
    """
    levels = kind.levels(device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    halves = (torch.arange(512, dtype=torch.float32, device=device) - 256) / 2
    return torch.bucketize(halves, midpoints, right=True).to(torch.uint8)


def nearest_entry(values: Tensor, scratch: Tensor, table: Tensor) -> Tensor:
    """Entries of ``table`` (see ``codebook_table``) for ``values``; overwrites ``scratch``."""
    torch.mul(values, 2.0, out=scratch).floor_().clamp_(-256, 255).add_(256)
    return table.index_select(0, scratch.int().view(-1)).view(values.shape)
