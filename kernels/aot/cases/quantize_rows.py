"""quantize_rows, by element type and group; short rows and rows that are read twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aot.case import Case, meta
from llmopt_kernels.quantize_rows import launch_quantize_by, launch_quantize_rows, launch_row_scales

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def cases() -> Iterator[Case]:
    """4096 columns, and 14336, more than a program keeps."""
    for dtype, archs in ((FP8, (90,)), (INT8, (80, 90))):
        kind = str(dtype).removeprefix("torch.")
        for columns, group in ((4096, None), (14336, None), (4096, 128)):
            x = meta(64, columns)
            yield Case(
                f"quantize_rows {kind} columns {columns} group {group}",
                lambda x=x, d=dtype, g=group: launch_quantize_rows(x, d, g),
                False,
                archs=archs,
            )
    x, scales = meta(64, 4096), meta(64, 1, dtype=torch.float32)
    one = meta(1, dtype=torch.float32)
    for name, given in (("token", scales), ("tensor", one)):
        yield Case(
            f"quantize_rows fp8 by scales of the {name}",
            lambda given=given: launch_quantize_by(x, given, FP8),
            False,
            archs=(90,),
        )
    yield Case("quantize_rows fp8 scales alone", lambda: launch_row_scales(x, FP8), False)
