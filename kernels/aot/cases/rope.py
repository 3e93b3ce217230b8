"""rope, by element type."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aot.case import Case, meta
from llmopt_kernels.rope import DTYPES, launch_rope


def cases() -> Iterator[Case]:
    """Heads of 128 channels, rotated whole."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        tables = meta(4096, 64, dtype=torch.float32), meta(4096, 64, dtype=torch.float32)
        x, positions = meta(256, 32, 128, dtype=dtype), meta(256, dtype=torch.int32)
        yield Case(f"rope {name}", lambda x=x, p=positions, t=tables: launch_rope(x, p, *t), False)
