"""The meeting point of searches, files and the gate: a weight in one of ggml's block types."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantization.ggml.types import GGMLType

_DIGEST_ELEMENTS = 1 << 22  # dequantized at a time


@dataclass(frozen=True, slots=True)
class GGMLTensor:
    """A weight of logical shape ``(out, in)`` in a block type.

    Attributes:
        type: what the rest means; not a plain type.
        codes: ``(out, in) uint8``, each in ``0 .. type.max_code``.
        scales: ``(out, in // type.block_size) float16``, ``d`` of each block.
        sub_scales: ``(out, in // type.sub_block) int16``, what multiplies ``d`` in each sub-block
            (bias removed), or ``None`` where blocks are not cut.
        mins: like ``scales``, the minimum of each block as stored, or ``None``.
        sub_mins: like ``sub_scales``, what multiplies the minimum, or ``None``.
    """

    type: GGMLType
    codes: Tensor
    scales: Tensor
    sub_scales: Tensor | None = None
    mins: Tensor | None = None
    sub_mins: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight it stands for."""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def step_sizes(self) -> Tensor:
        """What one level is worth: ``(out, in // sub_block) float32``."""
        return _spread(self.scales, self.sub_scales)

    def shifts(self) -> Tensor | None:
        """What is added to scaled levels: ``(out, in // sub_block) float32``, or ``None``."""
        if self.mins is None:
            return None
        return _spread(self.mins, self.sub_mins) * self.type.min_sign

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight it means: ``step * level + shift``, ``(out, in)`` in ``dtype``.

        Formed in float32 and rounded once to ``dtype``. Equal to ggml's ``dequantize_row_*`` to the
        bit: the products are exact (11 bits of ``d``, at most 7 of a sub-scale, 7 of a level), so
        neither their order nor a fused multiply-add can change the one rounding of the sum.
        """
        steps = self.step_sizes()
        if self.type.codebook is None:
            values = self.codes.to(torch.float32)
            if self.type.offset:
                values -= self.type.offset
        else:
            values = self.type.levels(self.codes.device)[self.codes.int()]
        blocks = values.view(*steps.shape, self.type.sub_block)
        blocks *= steps.unsqueeze(2)
        shifts = self.shifts()
        if shifts is not None:
            blocks += shifts.unsqueeze(2)
        return values.to(dtype)

    def take_rows(self, rows: slice) -> GGMLTensor:
        """Some of its rows, as views."""

        def taken(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[rows]

        return GGMLTensor(
            self.type,
            self.codes[rows],
            self.scales[rows],
            taken(self.sub_scales),
            taken(self.mins),
            taken(self.sub_mins),
        )

    def digest(self) -> str:
        """SHA-256 over the dequantized float32 bytes (little-endian), row after row.

        Any decoder can be held to it, whatever it keeps of codes and scales.
        """
        return digest_values([self])


def digest_values(parts: Iterable[GGMLTensor | Tensor]) -> str:
    """SHA-256 over the float32 bytes (little-endian) of tensors, one after the other.

    Those in blocks are dequantized, and plain ones converted, some rows at a time.
    """
    digest = hashlib.sha256()
    for part in parts:
        rows, columns = (part.shape[0], part.shape[-1]) if len(part.shape) > 1 else (1, 0)
        step = max(1, _DIGEST_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            some = slice(start, start + step)
            if isinstance(part, GGMLTensor):
                values = part.take_rows(some).dequantize()
            else:
                values = (part[some] if columns else part).float()
            digest.update(values.cpu().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _spread(of_blocks: Tensor, of_sub_blocks: Tensor | None) -> Tensor:
    """``of_blocks (out, blocks)`` times ``of_sub_blocks (out, sub-blocks)``, in float32."""
    if of_sub_blocks is None:
        return of_blocks.float()
    rows, blocks = of_blocks.shape
    product = of_blocks.float().unsqueeze(2) * of_sub_blocks.view(rows, blocks, -1)
    return product.view(rows, -1)
