"""What ggml's element types are made of, as data.

A stored block of ``block_size`` weights has a float16 scale ``d`` (and, in some types, a float16
minimum). Types of 256 weights a block cut it into sub-blocks with a small integer each that
multiplies ``d`` (and one that multiplies the minimum). A weight is ``d * sub_scale * level``, plus
or minus the minimum, where the level is the stored code less an offset or an entry of a codebook.

Numbers are those of ``ggml.h`` and ``ggml-common.h`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

import torch
from torch import Tensor

from llmopt.errors import BadInputError

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class GGMLType:
    """An element type of a GGUF tensor.

    Attributes:
        name: as ggml spells it, ``Q4_K``.
        id: ggml's number for it, as stored in files.
        block_size: weights a stored block; 1 for plain floating point.
        block_bytes: bytes a stored block.
        bits: nominal width of a weight.
        sub_block: weights that share a scale.
        offset: the code whose level is zero, in types without codebook or minimum.
        codebook: the level of each code where it is not ``code - offset``.
        sub_scale_limits: smallest and largest integer that multiplies ``d``, ``None`` where blocks
            are not cut.
        sub_min_limit: largest integer that multiplies the minimum; ``None`` as above.
        min_sign: 1 where the minimum is added, -1 where it is subtracted, 0 where there is none.
    """

    name: str
    id: int
    block_size: int
    block_bytes: int
    bits: int
    sub_block: int = 1
    offset: int = 0
    codebook: tuple[int, ...] | None = None
    sub_scale_limits: tuple[int, int] | None = None
    sub_min_limit: int | None = None
    min_sign: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is plain floating point: F32, F16 or BF16."""
        return self.block_size == 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales included."""
        return self.block_bytes * 8 / self.block_size

    @property
    def label(self) -> str:
        """For reports: ``Q4_K (4.5 bits a weight)``."""
        return f"{self.name} ({self.bits_per_weight:g} bits a weight)"

    @property
    def max_code(self) -> int:
        """The largest code of a block type."""
        return (1 << self.bits) - 1

    @property
    def sub_blocks(self) -> int:
        """Sub-blocks a stored block, 1 where it is not cut."""
        return self.block_size // self.sub_block

    def divides(self, in_features: int) -> bool:
        """Whether rows of ``in_features`` weights are whole blocks."""
        return in_features % self.block_size == 0

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row of ``in_features`` weights.

        Raises:
            BadInputError: if rows are not whole blocks.
        """
        if in_features <= 0 or not self.divides(in_features):
            raise BadInputError(
                f"{self.name} stores blocks of {self.block_size} weights, which do not make up "
                f"rows of {in_features}",
                f"store this tensor as {fitting_type(self, in_features).name}",
            )
        return in_features // self.block_size * self.block_bytes

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """What each code is worth before scaling, ``(codes,) float32``."""
        if self.codebook is not None:
            return torch.tensor(self.codebook, dtype=torch.float32, device=device)
        codes = torch.arange(self.max_code + 1, dtype=torch.float32, device=device)
        return codes - self.offset


_ALL = (
    GGMLType("F32", 0, 1, 4, 32),
    GGMLType("F16", 1, 1, 2, 16),
    GGMLType("BF16", 30, 1, 2, 16),
    GGMLType("Q8_0", 8, 32, 34, 8, 32, offset=128),
    GGMLType("Q4_0", 2, 32, 18, 4, 32, offset=8),
    GGMLType("Q4_1", 3, 32, 20, 4, 32, min_sign=1),
    GGMLType("Q5_0", 6, 32, 22, 5, 32, offset=16),
    GGMLType("Q5_1", 7, 32, 24, 5, 32, min_sign=1),
    GGMLType("Q2_K", 10, 256, 84, 2, 16, 0, None, (0, 15), 15, -1),
    GGMLType("Q3_K", 11, 256, 110, 3, 16, 4, None, (-32, 31)),
    GGMLType("Q4_K", 12, 256, 144, 4, 32, 0, None, (0, 63), 63, -1),
    GGMLType("Q5_K", 13, 256, 176, 5, 32, 0, None, (0, 63), 63, -1),
    GGMLType("Q6_K", 14, 256, 210, 6, 16, 32, None, (-128, 127)),
    GGMLType("IQ4_NL", 20, 32, 18, 4, 32, 0, IQ4_LEVELS),
    GGMLType("IQ4_XS", 23, 256, 136, 4, 32, 0, IQ4_LEVELS, (-32, 31)),
)

GGML_TYPES: Mapping[str, GGMLType] = MappingProxyType({kind.name: kind for kind in _ALL})
"""The types that llmopt reads and writes, by name."""

GGML_TYPES_BY_ID: Mapping[int, GGMLType] = MappingProxyType({kind.id: kind for kind in _ALL})
"""The same by the number that files have."""

# What llama.cpp stores where rows are not whole blocks of the type that was asked for
# (tensor_type_fallback in src/llama-quant.cpp); where that one does not fit either, F16.
_FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def ggml_type(name: str) -> GGMLType:
    """The type of a name.

    Raises:
        BadInputError: if there is none; names the closest.
    """
    if name in GGML_TYPES:
        return GGML_TYPES[name]
    close = get_close_matches(name.upper(), GGML_TYPES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise BadInputError(
        f"{name!r} is not a GGUF element type that llmopt knows",
        f"{hint}the types are {', '.join(GGML_TYPES)}",
    )


def fitting_type(wanted: GGMLType, in_features: int) -> GGMLType:
    """What llama.cpp stores instead of ``wanted`` in rows of ``in_features`` weights.

    ``wanted`` itself where rows are whole blocks of it.
    """
    if wanted.divides(in_features):
        return wanted
    instead = GGML_TYPES[_FALLBACKS.get(wanted.name, wanted.name)]
    return instead if instead.divides(in_features) else GGML_TYPES["F16"]
