"""Rounding to nearest: the solver that needs no calibration, and the yardstick of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.quantization.grid import Clip, encode, group_moments, make_grid
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme


def rtn(
    weight: Tensor,
    scheme: Scheme,
    *,
    clip: Clip = "none",
    scale_dtype: torch.dtype,
    hessian: Tensor | None = None,
) -> QuantizedTensor:
    """Round ``weight (out, in)`` to the nearest code of each group's grid.

    ``hessian (in, in)``, any multiple of ``sum x x^T``, is what ``clip="activation"`` goes by.

    ``activation_order="weight"`` leaves the groups where they lie, so it changes nothing here.

    Raises:
        BadInputError: if the weight is not a matrix, the group size does not divide ``in``, the
            scheme forms its groups by activation order, or ``clip="activation"`` has no Hessian.
        NumericalError: on NaN, infinity, or a scale that ``scale_dtype`` cannot hold.
    """
    check_matrix(weight)
    if scheme.activation_order == "group":
        raise BadInputError(
            "rounding to nearest does not group columns by activation order",
            "use solver gptq, or activation_order: none",
        )
    if clip == "activation" and hessian is None:
        raise BadInputError(
            "clip: activation goes by the inputs, and there are none",
            "give calibration text, or clip: mse",
        )
    rows, columns = weight.shape
    group_columns = scheme.columns_per_group(columns)
    moments = None
    if clip == "activation" and hessian is not None:
        moments = group_moments(hessian, group_columns)
    groups = weight.reshape(rows, -1, group_columns)
    grid = make_grid(groups, scheme, scale_dtype, clip, moments)
    return QuantizedTensor(
        codes=encode(groups, grid, scheme).view(rows, columns),
        scales=grid.scales,
        zero_points=grid.zero_points,
        group_index=None,
        scheme=scheme,
    )


def check_matrix(weight: Tensor) -> None:
    """Raise BadInputError unless ``weight`` is a floating-point matrix with elements."""
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise BadInputError(
            f"cannot quantize a {weight.dtype} tensor of shape {tuple(weight.shape)}",
            "only floating-point matrices are quantized; list this tensor under ignore",
        )
