"""Uncut blocks rounded by their largest value or their range: no search, and as fast as memory.

``quantize_row_q8_0_ref`` and its kin of llama.cpp's ggml-quants.c, the same bytes: each block's
scale comes of its largest value alone. Blocks stand in rows here, as weights do, and every pass
over them is one that a processor does several values of at a time (conversion to int8 drops the
fraction; torch's own ``trunc`` is ten times slower).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.quantization.ggml.columns import quotient, reciprocal, signed_peak, to_float16
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.ggml.types import GGMLType

_BELOW_HALF = 0.5 - 2.0**-25  # the largest float32 less than a half


def is_nearest(kind: GGMLType, importance: Tensor | None) -> bool:
    """Whether llama.cpp searches nothing: blocks are not cut, and nobody weighs their columns."""
    uncut = kind.sub_scale_limits is None and kind.codebook is None
    return uncut and (importance is None or kind.name == "Q8_0")


def nearest(rows: Tensor, kind: GGMLType) -> GGMLTensor:
    """Quantize whole rows ``(rows, in)`` of a type that ``is_nearest``.

    Raises:
        NumericalError: a scale that float16 cannot hold.
    """
    x = rows.reshape(-1, kind.block_size).float()
    minimums = None
    if kind.name == "Q8_0":
        scales, codes = _absolute_maximum(x, kind)
    elif kind.min_sign:
        scales, minimums, codes = _by_range(x, kind)
    else:
        scales, codes = _by_peak(x, kind)
    count = len(rows)
    return GGMLTensor(
        type=kind,
        codes=codes.view(count, -1),
        scales=to_float16(scales, kind).view(count, -1),
        mins=None if minimums is None else to_float16(minimums, kind).view(count, -1),
    )


def _absolute_maximum(x: Tensor, kind: GGMLType) -> tuple[Tensor, Tensor]:
    scales = quotient(x.abs().amax(1), kind.offset - 1)
    scaled = x * reciprocal(scales)[:, None]
    # Half away from zero, as C's roundf: what is just below a half must not become a whole.
    scaled += torch.copysign(torch.tensor(_BELOW_HALF, device=x.device), scaled)
    codes = scaled.to(torch.int8).view(torch.uint8)
    return scales, codes.bitwise_xor_(kind.offset)


def _by_peak(x: Tensor, kind: GGMLType) -> tuple[Tensor, Tensor]:
    scales = quotient(_first_peak(x), -kind.offset)
    scaled = (x * reciprocal(scales)[:, None]).add_(kind.offset + 0.5)
    return scales, _whole(scaled, kind)


def _first_peak(x: Tensor) -> Tensor:
    """Of each row the value of largest magnitude, the first of two."""
    highest, lowest = x.amax(1), x.amin(1)
    peaks = torch.where(-lowest > highest, lowest, highest)
    tied = highest == -lowest
    if bool(tied.any()):
        peaks[tied] = signed_peak(x[tied].t())
    return peaks


def _by_range(x: Tensor, kind: GGMLType) -> tuple[Tensor, Tensor, Tensor]:
    lowest = x.amin(1)
    scales = quotient(x.amax(1) - lowest, kind.max_code)
    scaled = (x - lowest[:, None]).mul_(reciprocal(scales)[:, None]).add_(0.5)
    return scales, lowest, _whole(scaled, kind)


def _whole(scaled: Tensor, kind: GGMLType) -> Tensor:
    """Codes ``uint8`` of values that are not negative, the fraction dropped."""
    return scaled.to(torch.int8).clamp_(max=kind.max_code).view(torch.uint8)
