"""A weight into one of ggml's block types, rounded to nearest on scales that a search finds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.ggml.columns import importance_columns, to_columns, to_tensor
from llmopt.quantization.ggml.compatible import compatible, row_energies
from llmopt.quantization.ggml.least_squares import least_squares
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.ggml.types import GGMLType
from llmopt.quantization.rtn import check_matrix

Search = Literal["compatible", "least-squares"]

# Elements of a chunk of rows. On a CPU the half dozen buffers of a search then stay in the caches;
# on a GPU launches are what costs.
_CPU_ELEMENTS = 1 << 17
_GPU_ELEMENTS = 1 << 25

# Where no weight of a sub-block matters, all matter alike, by this part of what the others do.
_DEAD_IMPORTANCE = 1e-6


def quantize_blocks(
    weight: Tensor,
    kind: GGMLType,
    *,
    importance: Tensor | None = None,
    search: Search = "least-squares",
) -> GGMLTensor:
    """Quantize ``weight (out, in)`` of any floating-point type, which is not changed.

    Args:
        weight: the matrix; computed in float32 on its device.
        kind: a block type whose blocks divide ``in`` (see ``fitting_type``).
        importance: ``(in,)``, the mean square of each input or a multiple of it; ``None`` where all
            columns count alike.
        search: ``least-squares`` for the least importance-weighted squared error, ``compatible``
            for what llama.cpp finds.

    Raises:
        BadInputError: if weight, type and importance do not fit together.
        NumericalError: on NaN, infinity, or a scale that float16 cannot hold.
    """
    importance = check_blocks(weight, kind, importance)
    if search not in ("compatible", "least-squares"):
        raise BadInputError(
            f"{search!r} is no search for block types", 'use "least-squares" or "compatible"'
        )
    if search == "least-squares":
        importance = _without_dead_blocks(importance, weight, kind)
    else:
        energies = row_energies(weight)
    parts, weights, rows_of_weights, start = [], None, 0, 0
    for chunk in _chunks(weight):
        rows = len(chunk)
        x = to_columns(chunk, kind)
        if importance is not None and rows != rows_of_weights:
            weights, rows_of_weights = importance_columns(importance, kind, rows), rows
        if search == "compatible":
            found = compatible(x, kind, weights, energies[start : start + rows])
        else:
            assert weights is not None
            found = least_squares(x, kind, weights)
        parts.append(to_tensor(found, kind, rows))
        start += rows
    return _join(parts)


def check_blocks(weight: Tensor, kind: GGMLType, importance: Tensor | None) -> Tensor | None:
    """The importance in float32 on the weight's device, once everything fits together.

    Raises:
        BadInputError: if it does not.
        NumericalError: on NaN or infinity in the weight.
    """
    check_matrix(weight)
    if kind.is_plain:
        raise BadInputError(
            f"{kind.name} has no blocks to search scales for", "pack it with pack_plain"
        )
    columns = weight.shape[1]
    kind.row_bytes(columns)
    for chunk in _chunks(weight):
        if not bool(torch.isfinite(chunk).all()):
            raise NumericalError(
                "NaN or infinity in a weight",
                "the source checkpoint is damaged: fetch it again, or leave this tensor as it is",
            )
    if importance is None:
        return None
    if tuple(importance.shape) != (columns,):
        raise BadInputError(
            f"an importance of shape {tuple(importance.shape)} for a weight of {columns} input "
            "features",
            f"give {columns} numbers, one for each input feature: the importance matrix may be "
            "another model's",
        )
    importance = importance.to(weight.device, torch.float32)
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise BadInputError(
            "an importance that is negative, NaN or infinite",
            "importances are mean squares of inputs: compute the importance matrix again",
        )
    return importance


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    """Some rows of ``weight (out, in)`` at a time."""
    elements = _CPU_ELEMENTS if weight.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, elements // weight.shape[1])
    for start in range(0, len(weight), step):
        yield weight[start : start + step]


def _without_dead_blocks(importance: Tensor | None, weight: Tensor, kind: GGMLType) -> Tensor:
    if importance is None:
        return torch.ones(weight.shape[1], device=weight.device)
    mean = importance.mean()
    if not bool(mean > 0):
        return torch.ones_like(importance)
    # Of the order of 1, so that no product of them leaves the range of float32.
    sub_blocks = (importance / mean).view(-1, kind.sub_block)
    dead = sub_blocks.amax(dim=1, keepdim=True) < torch.finfo(torch.float32).eps ** 2
    return torch.where(dead, _DEAD_IMPORTANCE, sub_blocks).flatten()


def _join(parts: list[GGMLTensor]) -> GGMLTensor:
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor | None:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else torch.cat(pieces)

    codes, scales = joined("codes"), joined("scales")
    assert codes is not None and scales is not None
    return GGMLTensor(
        parts[0].type, codes, scales, joined("sub_scales"), joined("mins"), joined("sub_mins")
    )
