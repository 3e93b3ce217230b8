"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt_kernels.cpu_int4 import CpuInt4Weight, cpu_int4_refusal, from_cpu_int4, to_cpu_int4
from llmopt_kernels.linear_w4a16 import linear_w4a16
from llmopt_kernels.packed_weight import PackedWeight, pack_codes

_PARTS = ("packed", "scales", "zero_points", "group_index", "scales_and_zeros")


class QuantizedLinear(nn.Module):
    """``y = x @ W^T + b`` for a quantized weight of 8, 4, 3 or 2 bits; for inference.

    One copy of the weight is held, in one of two layouts that follow the device: that of torch's
    CPU int4 kernel where it can hold the weight, the plain one (codes without gaps, row by row)
    elsewhere. ``path`` says which product that gives.

    Args:
        tensor: the weight.
        bias: ``(out,)`` or ``None``.
        dtype: element type of the scales in the CPU layout: that of the input to come. A later
            ``.to(dtype)`` converts them as it does any floating buffer.
    """

    packed: Tensor
    scales: Tensor | None
    zero_points: Tensor | None
    group_index: Tensor | None
    scales_and_zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.scheme = tensor.scheme
        for part in (*_PARTS, "bias"):
            self.register_buffer(part, None)
        weight = PackedWeight(
            packed=pack_codes(tensor.codes, tensor.scheme.bits),
            bits=tensor.scheme.bits,
            in_features=self.in_features,
            scales=tensor.scales.clone(),
            zero_points=tensor.zero_points,
            group_index=tensor.group_index,
        )
        self.cpu_refusal = cpu_int4_refusal(weight)
        self._hold(weight)
        self._settle(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)

    @property
    def weight(self) -> PackedWeight | CpuInt4Weight:
        """The weight as ``llmopt_kernels`` takes it; a view of the buffers."""
        if self.scales_and_zeros is not None:
            return CpuInt4Weight(self.packed, self.scales_and_zeros)
        assert self.scales is not None
        return PackedWeight(
            self.packed,
            self.scheme.bits,
            self.in_features,
            self.scales,
            self.zero_points,
            self.group_index,
        )

    @property
    def path(self) -> str:
        """Which product serves it, and why not the other."""
        if self.scales_and_zeros is not None:
            return "int4 kernel for small batches, dequantized product for large ones"
        if self.packed.device.type != "cpu":
            return f"dequantized product (on {self.packed.device.type})"
        return f"dequantized product (the CPU int4 kernel cannot hold {self.cpu_refusal})"

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)`` in the type of ``x``."""
        return linear_w4a16(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        group = self.scheme.group_size or "channel"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name}, group_size={group}, "
            f"path={self.path}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the buffers, then take the layout of the device they are on."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        scales = self.scales if self.scales_and_zeros is None else self.scales_and_zeros
        assert scales is not None
        self._settle(scales.dtype)
        return self

    def _settle(self, dtype: torch.dtype) -> None:
        if self.packed.is_meta:
            return
        weight, on_cpu = self.weight, _kernel_device(self.packed.device)
        if isinstance(weight, CpuInt4Weight) and not on_cpu:
            self._hold(from_cpu_int4(weight))
        elif isinstance(weight, PackedWeight) and on_cpu and self.cpu_refusal is None:
            self._hold(to_cpu_int4(weight, dtype))

    def _hold(self, weight: PackedWeight | CpuInt4Weight) -> None:
        for part in _PARTS:
            setattr(self, part, getattr(weight, part, None))


def _kernel_device(device: torch.device) -> bool:
    """Whether torch's int4 kernel layout is the one for ``device``."""
    return device.type == "cpu"
