"""Tensors whose elements lie so far apart that an index of 32 bits does not reach them."""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap
from tempfile import TemporaryFile

import pytest
import torch
from torch import Tensor

BEYOND = 2**31
"""The first index that 32 bits with a sign do not hold."""
ALIGNMENT = 16
"""Strides are multiples of it, as those of real tensors are."""


def far_apart(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Copies, of which neighbours along ``dim`` are so far apart that the last is at ``BEYOND``.

    The copies lie between one another in one storage, as small as can be. On a CPU only what is
    touched of it takes memory; on a GPU all does, and where there is not so much the test is
    skipped.

    Args:
        tensors: of one element type and of one size along ``dim``, 2 or more.
        dim: which dimension; negative ones count from the end.
    """
    first = tensors[0]
    gaps = first.shape[dim] - 1
    assert gaps > 0 and all(x.shape[dim] == gaps + 1 and x.dtype == first.dtype for x in tensors)
    step = -(-BEYOND // (gaps * ALIGNMENT)) * ALIGNMENT
    near = [
        torch.empty_like(x.select(dim, 0), memory_format=torch.contiguous_format) for x in tensors
    ]
    starts = [sum(x.numel() for x in near[:index]) for index in range(len(near) + 1)]
    storage = _storage(gaps * step + starts[-1], first)
    copies = []
    for x, row, start in zip(tensors, near, starts, strict=False):
        strides = list(row.stride())
        strides.insert(dim % x.dim(), step)
        copies.append(storage.as_strided(x.shape, strides, start).copy_(x))
    return copies


def _storage(num_elements: int, like: Tensor) -> Tensor:
    num_bytes = num_elements * like.itemsize
    if like.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(like.device)
        if free < num_bytes:
            pytest.skip(f"needs {num_bytes / 2**30:.0f} GiB of the GPU's memory")
        return torch.empty(num_elements, dtype=like.dtype, device=like.device)
    with TemporaryFile() as file:
        file.truncate(num_bytes)
        return torch.frombuffer(mmap(file.fileno(), num_bytes), dtype=like.dtype)
