"""A weight in fp8 e4m3 with its scales: one a tensor, one a channel, or one a 128 x 128 block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmopt_kernels.launching import (
    check_choice,
    check_dtype,
    check_last_contiguous,
    check_shape,
)
from llmopt_kernels.quantize_rows import GROUP
from llmopt_kernels.rounding import quantize, row_scale

FP8 = torch.float8_e4m3fn
Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight ``(out, in)``: ``codes * scales``, the scales spread over what shares them.

    Attributes:
        codes: ``(out, in) float8_e4m3fn``.
        scales: float32: ``()``, ``(1,)`` or ``(1, 1)`` for the tensor, ``(out, 1)`` for channels,
            ``(ceil(out / 128), ceil(in / 128))`` for blocks.

    Raises:
        ValueError: element type, stride or shape that does not fit.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_shape("codes", self.codes, (None, None))
        check_dtype("codes", self.codes, (FP8,))
        check_last_contiguous("codes", self.codes)
        check_dtype("scales", self.scales, (torch.float32,))
        if is_one(self.scales):
            return
        out_features, in_features = self.codes.shape
        channels, blocks = (out_features, 1), (num_groups(out_features), num_groups(in_features))
        if tuple(self.scales.shape) not in (channels, blocks):
            raise ValueError(
                f"scales have shape {list(self.scales.shape)}; codes {[out_features, in_features]} "
                f"take [1], {list(channels)} or, for blocks, {list(blocks)}"
            )

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """Columns."""
        return int(self.codes.shape[1])

    @property
    def granularity(self) -> Granularity:
        """What shares a scale, by the shape of the scales."""
        if is_one(self.scales):
            return "tensor"
        return "channel" if tuple(self.scales.shape) == (self.out_features, 1) else "block"

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(out, in)`` of ``dtype``."""
        scales = self.scales.to(dtype)
        if self.granularity == "block":
            scales = scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
            scales = scales[: self.out_features, : self.in_features]
        return self.codes.to(dtype) * scales


def quantize_weight(weight: Tensor, granularity: Granularity) -> Fp8Weight:
    """Round ``weight (out, in)`` with the scales that bring each largest value to 448.

    Raises:
        ValueError: shape or granularity that does not fit.
    """
    check_shape("weight", weight, (None, None))
    check_choice("granularity", granularity, ("tensor", "channel", "block"))
    rows, columns = weight.shape
    height, width = {"tensor": (rows, columns), "channel": (1, columns), "block": (GROUP, GROUP)}[
        granularity
    ]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % width, 0, -rows % height))
    tiles = padded.unfold(0, height, height).unfold(1, width, width)
    scales = row_scale(tiles.flatten(2), FP8)
    codes = quantize(tiles.flatten(2), scales, FP8).view(tiles.shape).permute(0, 2, 1, 3)
    codes = codes.reshape(padded.shape)[:rows, :columns].contiguous()
    return Fp8Weight(codes, scales[..., 0])


def is_one(scales: Tensor) -> bool:
    """Whether there is one scale for everything, by its shape."""
    return tuple(scales.shape) in ((), (1,), (1, 1))


def num_groups(size: int, group: int = GROUP) -> int:
    """How many groups ``size`` neighbours make, the last one perhaps shorter."""
    return -(-size // group)
