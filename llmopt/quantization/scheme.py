"""What a weight becomes: element type, group size, symmetry, order of solving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmopt.errors import BadInputError

IntBits = Literal[2, 3, 4, 8]
ActivationOrder = Literal["none", "weight", "group"]

INT_BITS: tuple[int, ...] = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Scheme:
    """An integer weight scheme with 16-bit activations (``W4A16`` and its kin).

    Attributes:
        bits: width of a code; codes are ``0 .. 2**bits - 1`` (unsigned, offset by the zero point).
        group_size: input columns that share a scale; ``None`` is one scale a row (per channel).
        symmetric: if so the zero point is ``2**(bits - 1)`` everywhere and is not stored.
        activation_order: ``none``: columns solved left to right; ``weight``: solved by decreasing
            activation energy with the groups left where they lie; ``group``: groups are formed in
            that order too and a group index is stored.
    """

    bits: IntBits = 4
    group_size: int | None = 128
    symmetric: bool = True
    activation_order: ActivationOrder = "none"

    @property
    def name(self) -> str:
        """The field's name for it, for example ``W4A16``."""
        return f"W{self.bits}A16"

    @property
    def label(self) -> str:
        """The name with group size and symmetry: ``W4A16 g128 symmetric``."""
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.name} {group} {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def max_code(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric scheme, ``2**(bits - 1)``."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share one scale in a weight of ``in_features`` columns.

        Raises:
            BadInputError: if the group size does not divide ``in_features``.
        """
        if self.group_size is None:
            return in_features
        if in_features % self.group_size:
            raise BadInputError(
                f"group size {self.group_size} does not divide {in_features} input features",
                f"choose a group size that divides {in_features}, or per-channel scales "
                "(group_size: null)",
            )
        return self.group_size
