"""A weight into one of ggml's block types, rounded to nearest on scales that a search finds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.ggml.columns import importance_columns, to_columns, to_tensor
from llmopt.quantization.ggml.compatible import compatible, row_energies
from llmopt.quantization.ggml.least_squares import least_squares
from llmopt.quantization.ggml.nearest import is_nearest, nearest
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.ggml.threads import each_slice, row_slices
from llmopt.quantization.ggml.types import GGMLType
from llmopt.quantization.rtn import check_matrix

Search = Literal["compatible", "least-squares"]

# Elements of a chunk of rows. On a CPU the half dozen buffers of a search then stay in the caches;
# on a GPU launches are what costs.
_CPU_ELEMENTS = 1 << 17
_GPU_ELEMENTS = 1 << 25
_ENERGY_ROWS = 1024  # summed side by side

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
    slices = row_slices(len(weight), chunk_rows(weight))
    if search == "least-squares":
        quantized = _by_least_squares(weight, kind, importance)
    elif is_nearest(kind, importance):
        quantized = partial(_nearest_rows, weight, kind)
    else:
        quantized = _compatible_rows(weight, kind, importance)
    whole = _empty(weight, kind)
    each_slice(lambda rows: _fill(whole.take_rows(rows), quantized(rows)), slices, weight.device)
    return whole


def _nearest_rows(weight: Tensor, kind: GGMLType, rows: slice) -> GGMLTensor:
    return nearest(weight[rows], kind)


def _by_least_squares(
    weight: Tensor, kind: GGMLType, importance: Tensor | None
) -> Callable[[slice], GGMLTensor]:
    weights = _columns_of_chunk(_without_dead_blocks(importance, weight, kind), weight, kind)

    def quantized(rows: slice) -> GGMLTensor:
        x = to_columns(weight[rows], kind)
        found = least_squares(x, kind, weights[:, :, : x.shape[2]].contiguous())
        return to_tensor(found, kind, rows.stop - rows.start)

    return quantized


def _compatible_rows(
    weight: Tensor, kind: GGMLType, importance: Tensor | None
) -> Callable[[slice], GGMLTensor]:
    weights = None if importance is None else _columns_of_chunk(importance, weight, kind)
    energies = None
    if kind.sub_scale_limits is None and kind.codebook is None:
        many = row_slices(len(weight), _ENERGY_ROWS)
        energies = torch.cat(
            each_slice(lambda rows: row_energies(weight[rows]), many, weight.device)
        )

    def quantized(rows: slice) -> GGMLTensor:
        x = to_columns(weight[rows], kind)
        of_rows = None if weights is None else weights[:, :, : x.shape[2]].contiguous()
        found = compatible(x, kind, of_rows, None if energies is None else energies[rows])
        return to_tensor(found, kind, rows.stop - rows.start)

    return quantized


def _columns_of_chunk(importance: Tensor, weight: Tensor, kind: GGMLType) -> Tensor:
    """Of each value of a whole chunk; a shorter one has the first of them."""
    return importance_columns(importance, kind, min(chunk_rows(weight), len(weight)))


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
    slices = row_slices(len(weight), chunk_rows(weight))
    # The largest of anything and NaN is NaN; many times faster than isfinite.
    largest = each_slice(lambda rows: weight[rows].float().abs().amax(), slices, weight.device)
    if not bool(torch.stack(largest).isfinite().all()):
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


def chunk_rows(weight: Tensor) -> int:
    """Rows of ``weight (out, in)`` that are searched at a time."""
    elements = _CPU_ELEMENTS if weight.device.type == "cpu" else _GPU_ELEMENTS
    return max(1, elements // weight.shape[1])


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


def _empty(weight: Tensor, kind: GGMLType) -> GGMLTensor:
    """A tensor of the shape of ``weight``, to be filled."""
    rows, columns = weight.shape
    blocks, sub_blocks = columns // kind.block_size, columns // kind.sub_block
    is_cut, has_minimum = kind.sub_scale_limits is not None, kind.min_sign != 0

    def of(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width), dtype=dtype, device=weight.device)

    return GGMLTensor(
        type=kind,
        codes=of(columns, torch.uint8),
        scales=of(blocks, torch.float16),
        sub_scales=of(sub_blocks, torch.int16) if is_cut else None,
        mins=of(blocks, torch.float16) if has_minimum else None,
        sub_mins=of(sub_blocks, torch.int16) if is_cut and has_minimum else None,
    )


def _fill(target: GGMLTensor, part: GGMLTensor) -> None:
    for name in ("codes", "scales", "sub_scales", "mins", "sub_mins"):
        place, values = getattr(target, name), getattr(part, name)
        assert (place is None) == (values is None), name
        if place is not None:
            place.copy_(values)
