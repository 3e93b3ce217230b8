"""The meeting point of solvers, formats and kernels: codes, scales, zero points."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantized weight of logical shape ``(out, in)``.

    Attributes:
        codes: ``(out, in) uint8``, each in ``0 .. scheme.max_code``.
        scales: ``(out, groups)`` in the element type that goes to disk (bf16, fp16 or fp32).
        zero_points: ``(out, groups) uint8``, or ``None`` when the scheme is symmetric.
        group_index: ``(in,) int32``, the group of each column, or ``None`` when column ``j``
            belongs to group ``j // columns_per_group``.
        scheme: what the codes mean.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    group_index: Tensor | None
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight it stands for."""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def column_groups(self) -> Tensor:
        """The group of each input column, ``(in,) int64``."""
        if self.group_index is not None:
            return self.group_index.long()
        in_features = self.shape[1]
        columns = torch.arange(in_features, device=self.codes.device)
        return columns // self.scheme.columns_per_group(in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight it means: ``(code - zero_point) * scale``, ``(out, in)`` in ``dtype``.

        The product is formed in float32 from the stored scales and rounded once to ``dtype``.
        """
        groups = self.column_groups()
        scales = self.scales.float()[:, groups]
        if self.zero_points is None:
            centred = self.codes.float() - float(self.scheme.midpoint)
        else:
            centred = self.codes.float() - self.zero_points.float()[:, groups]
        return (centred * scales).to(dtype)

    def digest(self) -> str:
        """SHA-256 over codes, scales, zero points and group index, in this order.

        The round trip compares it with what an independent decoder finds on disk.
        """
        scales = self.scales.float().contiguous().cpu()
        parts: list[Tensor | None] = [self.codes, scales, self.zero_points, self.group_index]
        digest = hashlib.sha256()
        for part in parts:
            if part is None:
                digest.update(b"none")
            else:
                array = part.contiguous().cpu()
                digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
                digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
