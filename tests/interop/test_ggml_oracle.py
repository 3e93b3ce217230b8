"""ggml itself is the oracle: its bytes, what they mean, and that ours mean less error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantization.ggml.make_vectors import ask_ggml, run_ggml
from quantization.ggml.random_blocks import random_bytes
from quantization.ggml.samples import SAMPLES, importance, sample

from llmopt.quantization.ggml.packing import pack_blocks, unpack_blocks
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES

pytestmark = [
    pytest.mark.interop,
    pytest.mark.parametrize("python", ["llama-cpp"], indirect=True),
]

BLOCK_TYPES = [kind for kind in GGML_TYPES.values() if not kind.is_plain]
ROWS, COLUMNS = 24, 1024


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_compatible_search_gives_the_bytes_of_ggml(
    python: Path, weighted: bool, tmp_path: Path
) -> None:
    given = importance(COLUMNS) if weighted else None
    cases = [(kind, sample(name, ROWS, COLUMNS)) for kind in BLOCK_TYPES for name in SAMPLES]
    answers = ask_ggml(python, [(kind, weight, given) for kind, weight in cases], tmp_path)
    faults = []
    for (kind, weight), theirs in zip(cases, answers, strict=True):
        ours = quantize_blocks(weight, kind, importance=given, search="compatible")
        blocks = (pack_blocks(ours) == theirs).view(-1, kind.block_bytes).all(dim=1)
        # A compiler may contract a product and a sum to one rounding, which turns near ties.
        if float(blocks.float().mean()) < 0.95:
            faults.append(f"{kind.name}: {int((~blocks).sum())} of {len(blocks)} blocks differ")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_least_squares_search_has_less_error(python: Path, weighted: bool, tmp_path: Path) -> None:
    given = importance(COLUMNS) if weighted else None
    weights = torch.ones(COLUMNS) if given is None else given
    names = ("gaussian", "heavy-tailed", "bfloat16")
    cases = [(kind, sample(name, ROWS, COLUMNS)) for kind in BLOCK_TYPES for name in names]
    answers = ask_ggml(python, [(kind, weight, given) for kind, weight in cases], tmp_path)
    faults = []
    for (kind, weight), data in zip(cases, answers, strict=True):
        theirs = unpack_blocks(data, kind, COLUMNS).dequantize()
        ours = quantize_blocks(weight, kind, importance=given).dequantize()
        errors = [float(((found - weight) ** 2 * weights).sum()) for found in (ours, theirs)]
        if errors[0] > 0.99 * errors[1]:
            faults.append(f"{kind.name}: {errors[0] / errors[1]:.4f} of ggml's error")
    assert not faults, "\n".join(faults)


def test_bytes_mean_the_same_to_ggml(python: Path, tmp_path: Path) -> None:
    jobs = []
    for kind in BLOCK_TYPES:
        np.save(tmp_path / f"{kind.name}.npy", random_bytes(kind, 16, 4, seed=3).numpy())
        jobs.append(
            {
                "do": "dequantize",
                "name": kind.name,
                "columns": 4 * kind.block_size,
                "in": str(tmp_path / f"{kind.name}.npy"),
                "out": str(tmp_path / f"{kind.name}-out.npy"),
            }
        )
    run_ggml(python, jobs, tmp_path)
    for kind, job in zip(BLOCK_TYPES, jobs, strict=True):
        data = torch.from_numpy(np.load(job["in"]))
        ours = unpack_blocks(data, kind, job["columns"]).dequantize().numpy()
        theirs = np.load(job["out"])
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)), kind.name
