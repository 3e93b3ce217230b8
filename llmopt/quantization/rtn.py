"""Rounding to nearest: the solver that needs no calibration, and the yardstick of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.quantization.grid import Clip, encode, make_grid
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme


def rtn(
    weight: Tensor, scheme: Scheme, *, clip: Clip = "none", scale_dtype: torch.dtype
) -> QuantizedTensor:
    """Round ``weight (out, in)`` to the nearest code of each group's grid.

    ``activation_order="weight"`` leaves the groups where they lie, so it changes nothing here.

    Raises:
        BadInputError: if the weight is not a matrix, the group size does not divide ``in``, or
            the scheme forms its groups by activation order (there are no activations here).
        NumericalError: on NaN, infinity, or a scale that ``scale_dtype`` cannot hold.
    """
    check_matrix(weight)
    if scheme.activation_order == "group":
        raise BadInputError(
            "plain rounding cannot group columns by activation order: it sees no activations",
            "use solver gptq, or activation_order: none",
        )
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, scheme.columns_per_group(columns))
    grid = make_grid(groups, scheme, scale_dtype, clip)
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
