"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Self

import torch
from torch import Tensor, nn

from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt_kernels.cpu_int4 import CpuInt4Weight, cpu_int4_refusal, from_cpu_int4, to_cpu_int4
from llmopt_kernels.gpu_weight import (
    GpuWeight,
    from_gpu_weight,
    gpu_weight_refusal,
    to_gpu_weight,
)
from llmopt_kernels.linear_w4a16 import linear_w4a16
from llmopt_kernels.packed_weight import PackedWeight, pack_codes

_PARTS = ("packed", "scales", "zero_points", "group_index", "scales_and_zeros", "column_order")
_Layout = type[PackedWeight] | type[CpuInt4Weight] | type[GpuWeight]
_KERNEL_LAYOUTS: dict[str, _Layout] = {"cpu": CpuInt4Weight, "cuda": GpuWeight}
"""The layout of the kernel by device type; torch calls AMD's GPUs ``cuda`` too."""


class QuantizedLinear(nn.Module):
    """``y = x @ W^T + b`` for a quantized weight of 8, 4, 3 or 2 bits; for inference.

    One copy of the weight is held, in a layout that follows the device: that of torch's int4 kernel
    on a CPU, that of the Triton kernel on a GPU, and wherever the kernel cannot hold the weight the
    plain one (codes without gaps, row by row). ``path`` says which product that gives.

    Args:
        tensor: the weight.
        bias: ``(out,)`` or ``None``.
        dtype: element type of the scales in the CPU layout: that of the input to come. A later
            ``.to(dtype)`` converts them as it does any floating buffer.
        device: where it lives; the weight is laid out there, once, for that device's kernel.
    """

    packed: Tensor
    scales: Tensor | None
    zero_points: Tensor | None
    group_index: Tensor | None
    scales_and_zeros: Tensor | None
    column_order: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.scheme = tensor.scheme
        for part in (*_PARTS, "bias"):
            self.register_buffer(part, None)
        weight = PackedWeight(
            packed=pack_codes(tensor.codes.to(device), tensor.scheme.bits),
            bits=tensor.scheme.bits,
            in_features=self.in_features,
            scales=tensor.scales.to(device, copy=True),
            zero_points=_moved(tensor.zero_points, device),
            group_index=_moved(tensor.group_index, device),
        )
        self.refusals = kernel_refusals(weight)
        self._hold(weight)
        self._settle(dtype)
        self.bias = None if bias is None else bias.detach().to(device, dtype, copy=True)

    @property
    def weight(self) -> PackedWeight | CpuInt4Weight | GpuWeight:
        """The weight as ``llmopt_kernels`` takes it; a view of the buffers."""
        if self.layout is CpuInt4Weight:
            assert self.scales_and_zeros is not None
            return CpuInt4Weight(self.packed, self.scales_and_zeros)
        assert self.scales is not None
        if self.layout is GpuWeight:
            return GpuWeight(
                self.packed,
                self.scheme.bits,
                self.out_features,
                self.in_features,
                self.scales,
                self.zero_points,
                self.column_order,
            )
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
        if self.layout is CpuInt4Weight:
            return "int4 kernel for small batches, dequantized product for large ones"
        if self.layout is GpuWeight:
            return "Triton kernel for 16-bit inputs, dequantized product for float32"
        device = self.packed.device.type
        if device not in _KERNEL_LAYOUTS:
            return f"dequantized product (no kernel for {device})"
        kernel = "CPU int4 kernel" if device == "cpu" else "Triton kernel"
        refusal = self.refusals[_KERNEL_LAYOUTS[device]]
        return f"dequantized product (the {kernel} cannot hold {refusal})"

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
        wanted = layout_for(self.packed.device.type, self.refusals)
        if self.layout is wanted:
            return
        weight = self.weight
        if isinstance(weight, CpuInt4Weight):
            weight = from_cpu_int4(weight)
        elif isinstance(weight, GpuWeight):
            weight = from_gpu_weight(weight)
        if wanted is CpuInt4Weight:
            self._hold(to_cpu_int4(weight, dtype))
        elif wanted is GpuWeight:
            self._hold(to_gpu_weight(weight))
        else:
            self._hold(weight)

    def _hold(self, weight: PackedWeight | CpuInt4Weight | GpuWeight) -> None:
        self.layout = type(weight)
        for part in _PARTS:
            setattr(self, part, getattr(weight, part, None))


def _moved(part: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if part is None else part.to(device)


def kernel_refusals(weight: PackedWeight) -> dict[_Layout, str | None]:
    """Why each kernel cannot hold ``weight``; ``None`` for one that can."""
    no_triton = None if find_spec("triton") else "anything: triton is not installed"
    return {
        CpuInt4Weight: cpu_int4_refusal(weight),
        GpuWeight: gpu_weight_refusal(weight) or no_triton,
    }


def layout_for(device_type: str, refusals: Mapping[_Layout, str | None]) -> _Layout:
    """The layout that a weight takes on a device: its kernel's, the plain one if that refuses."""
    layout = _KERNEL_LAYOUTS.get(device_type, PackedWeight)
    return layout if refusals.get(layout) is None else PackedWeight
