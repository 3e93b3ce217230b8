"""How far a quantized layer's output is off, by the second moment of its input."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmopt.quantization.quantized_tensor import QuantizedTensor

_ERROR_ROWS = 256


def sampled_rows(weight: Tensor) -> slice:
    """At most 256 evenly spaced rows of ``weight (out, in)``, which errors are measured on."""
    return slice(None, None, -(-weight.shape[0] // _ERROR_ROWS))


def take_rows(tensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Some rows of a quantized weight: they are independent of each other."""
    zero_points = tensor.zero_points
    return replace(
        tensor,
        codes=tensor.codes[rows],
        scales=tensor.scales[rows],
        zero_points=None if zero_points is None else zero_points[rows],
    )


def relative_output_error(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    """``tr((W-Q) H (W-Q)^T) / tr(W H W^T)``, 0 where the denominator is.

    Args:
        weight: ``W (rows, in) float32``.
        found: ``Q``, the same.
        hessian: ``H (in, in) float32``.
    """
    total = _weighted_norm(weight, hessian)
    return _weighted_norm(weight - found, hessian) / total if total else 0.0


def _weighted_norm(rows: Tensor, hessian: Tensor) -> float:
    return float(((rows @ hessian) * rows).sum(dtype=torch.float64))
