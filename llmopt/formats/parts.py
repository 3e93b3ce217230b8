"""Reading the parts of a packed weight: each there, of its element type and of its shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.quantization.scheme import Scheme

WORDS = (torch.int32,)
INDICES = (torch.int32, torch.int64)
SCALES = (torch.bfloat16, torch.float16, torch.float32)

_NOT_ITS_OWN = (
    "correct its quantization_config where that is another checkpoint's, or download it again"
)


def read_part(
    module: str,
    part: str,
    read: Callable[[str], Tensor],
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
) -> Tensor:
    """The tensor ``module.part``.

    Args:
        module: the linear layer.
        part: the last part of the tensor's name.
        read: gives a tensor by its full name; ``KeyError`` if there is none.
        dtypes: the element types that it may have.
        shape: its shape; ``None`` takes any size there.

    Raises:
        BadInputError: if it is missing, or has another element type or shape.
    """
    name = f"{module}.{part}"
    try:
        tensor = read(name)
    except KeyError as error:
        raise BadInputError(f"{name} is missing", "download the checkpoint again") from error
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise BadInputError(f"{name} is {found}, expected {expected}", _NOT_ITS_OWN)
    fits = len(shape) == tensor.dim() and all(
        expected in (None, found) for expected, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        words = tuple("any" if size is None else size for size in shape)
        raise BadInputError(
            f"{name} has shape {tuple(tensor.shape)}, expected {words}", _NOT_ITS_OWN
        )
    return tensor


def count_groups(module: str, scheme: Scheme, columns: int) -> int:
    """Groups in a row of a stored weight of ``columns`` input features.

    Raises:
        BadInputError: if there are none, or the config's group size does not divide them.
    """
    if columns < 1:
        raise BadInputError(f"{module} has {columns} input features", _NOT_ITS_OWN)
    try:
        return columns // scheme.columns_per_group(columns)
    except BadInputError as error:
        raise BadInputError(f"{module}: {error.what}", _NOT_ITS_OWN) from error


def check_scales(module: str, scales: Tensor) -> None:
    """Refuse scales of NaN or infinity."""
    if not bool(torch.isfinite(scales).all()):
        raise BadInputError(
            f"{module} has scales of NaN or infinity", "download the checkpoint again"
        )


def trivial_groups(columns: int, columns_per_group: int) -> Tensor:
    """``(columns,) int32``: the group of each column where groups lie one after the other."""
    return torch.arange(columns, dtype=torch.int32) // columns_per_group


def check_group_index(module: str, part: str, index: Tensor, groups: int) -> Tensor:
    """A stored group index as ``int32``; raises BadInputError where it names no group."""
    lowest, highest = (int(value) for value in torch.aminmax(index))
    if lowest < 0 or highest >= groups:
        raise BadInputError(
            f"{module}.{part} holds {lowest if lowest < 0 else highest}, but there are only "
            f"{groups} groups, 0 to {groups - 1}",
            _NOT_ITS_OWN,
        )
    return index.to(torch.int32)


def check_midpoint(module: str, zero_points: Tensor, midpoint: int, hint: str = "") -> None:
    """Refuse stored zero points that a symmetric scheme contradicts.

    Some readers of such a file take the stored zero points, others the midpoint without looking.
    """
    if bool((zero_points == midpoint).all()):
        return
    other = int(zero_points[zero_points != midpoint][0])
    raise BadInputError(
        f"{module} holds the zero point {other}, but the config calls its scheme symmetric, which "
        f"means {midpoint} everywhere: readers disagree about such a file{hint}",
        "correct the config, or take the file from its maker again",
    )
