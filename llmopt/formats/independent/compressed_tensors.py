"""``pack-quantized``: rows of codes in 32-bit words, zero points packed along the rows."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from llmopt.formats.independent.shards import DecodedWeight, RawShards, broken, expand
from llmopt.quantization.scheme import Scheme


class CompressedTensorsDecoder:
    """Decodes ``weight_packed``, ``weight_scale``, ``weight_zero_point`` and ``weight_g_idx``."""

    def packed_modules(self, shards: RawShards) -> tuple[str, ...]:
        """The linear layers with a packed weight, in file order."""
        return shards.modules_with("weight_packed")

    def decode(self, shards: RawShards, module: str, scheme: Scheme) -> DecodedWeight:
        """The packed weight of one linear layer; see ``Decoder``."""
        rows, columns = (int(size) for size in shards.tensor(f"{module}.weight_shape"))
        owed = {
            "weight_zero_point": not scheme.symmetric,
            "weight_g_idx": scheme.activation_order == "group",
        }
        for part, is_owed in owed.items():
            if (f"{module}.{part}" in shards.names) != is_owed:
                raise broken(f"{module}.{part} is {'missing' if is_owed else 'not owed'}")
        zero_points = group_index = None
        if owed["weight_zero_point"]:
            words = shards.tensor(f"{module}.weight_zero_point").T
            zero_points = np.ascontiguousarray(expand(words, scheme.bits, rows).T)
        if owed["weight_g_idx"]:
            group_index = cast(NDArray[np.int32], shards.tensor(f"{module}.weight_g_idx"))
        codes = expand(shards.tensor(f"{module}.weight_packed"), scheme.bits, columns)
        if codes.shape != (rows, columns):
            raise broken(f"{module}: codes are {codes.shape}, weight_shape {(rows, columns)}")
        scales = shards.tensor(f"{module}.weight_scale").astype(np.float32)
        return DecodedWeight(codes, scales, zero_points, group_index)
