"""AWQ GEMM: 4-bit codes of eight rows interleaved in each word."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmopt.formats.independent.shards import DecodedWeight, RawShards, broken
from llmopt.quantization.scheme import Scheme

# Where in a word, in bits, each of its eight codes starts: even codes in the lower half.
_STARTS = (0, 16, 4, 20, 8, 24, 12, 28)


class AWQDecoder:
    """Decodes ``qweight``, ``qzeros`` and ``scales``."""

    def packed_modules(self, shards: RawShards) -> tuple[str, ...]:
        """The linear layers with a packed weight, in file order."""
        return shards.modules_with("qweight")

    def decode(self, shards: RawShards, module: str, scheme: Scheme) -> DecodedWeight:
        """The packed weight of one linear layer; see ``Decoder``."""
        if scheme.bits != 4 or scheme.activation_order == "group":
            raise broken(f"{module}: AWQ cannot mean {scheme}")
        codes = _nibbles(shards.tensor(f"{module}.qweight"))
        zero_points = _nibbles(shards.tensor(f"{module}.qzeros"))
        scales = shards.tensor(f"{module}.scales").astype(np.float32)
        if zero_points.shape != scales.shape or codes.shape[1] != scales.shape[1]:
            raise broken(
                f"{module}: codes {codes.shape}, zero points {zero_points.shape}, scales "
                f"{scales.shape}"
            )
        if scheme.symmetric and (zero_points != 8).any():
            raise broken(f"{module}: zero points besides the midpoint in a symmetric scheme")
        return DecodedWeight(
            codes=np.ascontiguousarray(codes.T),
            scales=np.ascontiguousarray(scales.T),
            zero_points=None if scheme.symmetric else np.ascontiguousarray(zero_points.T),
            group_index=None,
        )


def _nibbles(words: NDArray[np.generic]) -> NDArray[np.uint8]:
    """``(n, words) int32`` to ``(n, 8 * words) uint8``."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((*unsigned.shape, len(_STARTS)), dtype=np.uint8)
    for place, start in enumerate(_STARTS):
        codes[..., place] = (unsigned >> np.uint32(start)) & np.uint32(15)
    return codes.reshape(unsigned.shape[0], -1)
