"""``y = x @ W^T + b`` for a weight of packed codes and 16- or 32-bit activations.

``W[i, j] = (code[i, j] - zero_point[i, g(j)]) * scale[i, g(j)]``, ``g(j)`` the group of column j.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmopt_kernels.cpu_int4 import CHUNK_BYTES, CpuInt4Weight, matmul_dequantized, matmul_kernel
from llmopt_kernels.packed_weight import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_w4a16_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The product in float64: ``x (..., in)`` to ``(..., out) float64``."""
    product = x.double() @ weight.dequantize(torch.float64).T
    return product if bias is None else product + bias.double()


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

    Written by ``kernels/benchmarks/linear_cpu.py`` to the JSON file beside this module, with the
    machine they were measured on.
    """
    file = Path(__file__).with_name("linear_w4a16_cpu.json")
    measured = json.loads(file.read_text(encoding="utf-8"))["choices"]
    return {
        dtype: CpuChoice(row["max_kernel_rows"], getattr(torch, row["product_dtype"]))
        for dtype in DTYPES
        for row in [measured[str(dtype).removeprefix("torch.")]]
    }


def linear_w4a16(
    x: Tensor, weight: PackedWeight | CpuInt4Weight, bias: Tensor | None = None
) -> Tensor:
    """``x (..., in) @ weight^T + bias``, ``(..., out)`` in the type of ``x``.

    A ``CpuInt4Weight`` goes through torch's int4 kernel for small batches and a dequantized product
    for large ones (``cpu_choices``); a ``PackedWeight`` of any width always takes the dequantized
    product, a few rows of the weight at a time.

    Raises:
        ValueError: shape, element type or device that does not fit.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"input has {x.shape[-1]} features, the weight {weight.in_features}")
    if x.dtype not in DTYPES:
        raise ValueError(f"input is {x.dtype}; use one of {', '.join(map(str, DTYPES))}")
    if x.device != weight.packed.device:
        raise ValueError(f"input is on {x.device}, the weight on {weight.packed.device}")
    rows = x.reshape(-1, weight.in_features)
    if isinstance(weight, PackedWeight):
        product = _matmul_packed(rows, weight)
    elif rows.shape[0] <= cpu_choices()[x.dtype].max_kernel_rows:
        product = matmul_kernel(rows, weight)
    else:
        product = matmul_dequantized(rows, weight, cpu_choices()[x.dtype].product_dtype)
    if bias is not None:
        product = product + bias.to(product.dtype)
    return product.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _matmul_packed(x: Tensor, weight: PackedWeight) -> Tensor:
    dtype = cpu_choices()[x.dtype].product_dtype if x.device.type == "cpu" else x.dtype
    x = x.to(dtype)
    step = max(1, CHUNK_BYTES // (weight.in_features * dtype.itemsize))
    starts = range(0, weight.out_features, step)
    return torch.cat([x @ weight.dequantize(dtype, i, i + step).T for i in starts], -1)
