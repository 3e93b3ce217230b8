"""What happens to a tensor's values or rows on the way into a GGUF file, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Transform:
    """Rows in another order, experts stacked, a constant added; any of them, in this order.

    The first two move whole rows, so they serve packed rows ``(rows, row_bytes) uint8`` as they
    serve values ``(rows, columns)``; columns stay where they are, and so does an importance of
    columns.

    Attributes:
        heads: rows are permuted within each of this many heads; None for none. Hugging Face
            rotates a head's first half against its second (``rotate_half``), llama.cpp's ``llama``
            graph rotates neighbours: row ``i`` of the first half goes to ``2 * i``, of the second
            to ``2 * i + 1``.
        stacked: there is one source for each expert, stacked in front.
        added: a constant added to the values (norms that multiply by ``1 + w``).
    """

    heads: int | None = None
    stacked: bool = False
    added: float = 0.0

    @property
    def keeps_rows(self) -> bool:
        """Whether packed rows may be given, since no value changes."""
        return self.added == 0.0

    def apply(self, parts: Sequence[Tensor]) -> Tensor:
        """The file's tensor from its sources' (values or packed rows)."""
        moved = [_interleave_halves(part, self.heads) for part in parts]
        if self.stacked:
            return torch.stack(moved)
        (whole,) = moved
        if self.added:
            assert whole.is_floating_point(), "packed rows cannot be added to"
            # In float32, which the file has for norms: bfloat16 cannot hold 1 + w.
            return whole.to(torch.float32) + self.added
        return whole

    def invert(self, whole: Tensor, expert: int = 0) -> Tensor:
        """A source's tensor from the file's; of a stack, that of one expert."""
        part = whole[expert] if self.stacked else whole
        if self.added:
            part = part - self.added
        return _separate_halves(part, self.heads)


def _interleave_halves(rows: Tensor, heads: int | None) -> Tensor:
    if heads is None:
        return rows
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def _separate_halves(rows: Tensor, heads: int | None) -> Tensor:
    if heads is None:
        return rows
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)
