"""``linear_w4a16`` without its Triton kernel: torch's CPU int4 kernel, and dequantized products."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmopt_kernels.cpu_int4 import CHUNK_BYTES, CpuInt4Weight, matmul_dequantized, matmul_kernel
from llmopt_kernels.gpu_weight import GpuWeight, from_gpu_weight
from llmopt_kernels.packed_weight import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class CpuChoice:
    """What was measured to be fastest on a CPU for inputs of one element type.

    Attributes:
        max_kernel_rows: batch rows up to which the int4 kernel beats the dequantized product; 0
            where it never does.
        product_dtype: element type of the dequantized product.
    """

    max_kernel_rows: int
    product_dtype: torch.dtype


@cache
def cpu_choices() -> dict[torch.dtype, CpuChoice]:
    """The measured choices by element type of the input.

    Written by ``kernels/benchmarks/linear_cpu.py`` to a JSON file beside this module, with the
    machine they were measured on.
    """
    file = Path(__file__).with_name("linear_w4a16_cpu.json")
    measured = json.loads(file.read_text(encoding="utf-8"))["choices"]
    return {
        dtype: CpuChoice(row["max_kernel_rows"], getattr(torch, row["product_dtype"]))
        for dtype in DTYPES
        for row in [measured[str(dtype).removeprefix("torch.")]]
    }


def matmul_cpu_int4(x: Tensor, weight: CpuInt4Weight) -> Tensor:
    """``x (M, in) @ weight^T`` the way that was measured to be fastest for so many rows."""
    choice = cpu_choices()[x.dtype]
    if x.shape[0] <= choice.max_kernel_rows:
        return matmul_kernel(x, weight)
    return matmul_dequantized(x, weight, choice.product_dtype)


def matmul_plain(x: Tensor, weight: PackedWeight | GpuWeight) -> Tensor:
    """``x (M, in) @ weight^T`` on any device, some rows of the weight dequantized at a time."""
    dtype = cpu_choices()[x.dtype].product_dtype if x.device.type == "cpu" else x.dtype
    x = x.to(dtype)
    step = max(1, CHUNK_BYTES // (weight.in_features * dtype.itemsize))
    parts = []
    for first in range(0, weight.out_features, step):
        if isinstance(weight, GpuWeight):
            rows = from_gpu_weight(weight, first, first + step).dequantize(dtype)
        else:
            rows = weight.dequantize(dtype, first, first + step)
        parts.append(x @ rows.T)
    return torch.cat(parts, -1)
