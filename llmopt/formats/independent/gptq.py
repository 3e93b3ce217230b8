"""GPTQ: codes packed down the columns of ``qweight``, zero points along the rows of ``qzeros``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from llmopt.formats.independent.shards import DecodedWeight, RawShards, broken, expand
from llmopt.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True)
class GPTQDecoder:
    """Decodes ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    Attributes:
        stored_less: what the file takes off each zero point: 1 in v1, 0 in v2.
    """

    stored_less: int

    def packed_modules(self, shards: RawShards) -> tuple[str, ...]:
        """The linear layers with a packed weight, in file order."""
        return shards.modules_with("qweight")

    def decode(self, shards: RawShards, module: str, scheme: Scheme) -> DecodedWeight:
        """The packed weight of one linear layer; see ``Decoder``."""
        group_index = cast(NDArray[np.int32], shards.tensor(f"{module}.g_idx"))
        scales = shards.tensor(f"{module}.scales").astype(np.float32)
        words = shards.tensor(f"{module}.qweight")
        groups, rows = scales.shape
        columns = group_index.size
        if words.shape != (columns * scheme.bits // 32, rows):
            raise broken(f"{module}: {words.shape} words for {rows} rows of {columns} codes")
        codes = np.ascontiguousarray(expand(words.T, scheme.bits, columns))
        stored = expand(shards.tensor(f"{module}.qzeros"), scheme.bits, rows)
        if stored.shape != (groups, rows):
            raise broken(f"{module}: zero points are {stored.shape}, scales {scales.shape}")
        zero_points = stored.astype(np.int32) + self.stored_less
        if int(zero_points.max()) >= 1 << scheme.bits:
            raise broken(f"{module}: the zero point {zero_points.max()} is out of range")
        if scheme.symmetric and (zero_points != 1 << (scheme.bits - 1)).any():
            raise broken(f"{module}: zero points besides the midpoint in a symmetric scheme")
        grouped = scheme.activation_order == "group"
        if not grouped and (group_index != np.arange(columns) // (columns // groups)).any():
            raise broken(f"{module}: g_idx is in activation order, which the scheme is not")
        return DecodedWeight(
            codes=codes,
            scales=np.ascontiguousarray(scales.T),
            zero_points=None
            if scheme.symmetric
            else np.ascontiguousarray(zero_points.T.astype(np.uint8)),
            group_index=group_index.astype(np.int32) if grouped else None,
        )
