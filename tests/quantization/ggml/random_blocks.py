"""Random bytes as blocks of a type, with scales that are numbers."""

import numpy as np
import torch

from llmopt.quantization.ggml.types import GGMLType

SCALE_OFFSETS = {  # of the float16 scales and minimums in a block, by ggml-common.h
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_bytes(kind: GGMLType, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """``(rows, blocks * block_bytes) uint8``; finite scales of either sign, tiny ones too."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, kind.block_bytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[kind.name]:
        bits = rng.integers(0, 0x7C00, len(data)) | (rng.integers(0, 2, len(data)) << 15)
        data[:, offset : offset + 2] = bits.astype("<u2").reshape(-1, 1).view(np.uint8)
    return torch.from_numpy(data.reshape(rows, -1))
