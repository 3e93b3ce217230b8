"""Peak memory of the whole road, gate included, does not grow with the number of blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from support.gguf_models import open_and_plan, write_plain
from support.small_jobs import write_job, write_text
from support.tiny_models import llama_config, write_checkpoint

# What is freed goes back to the system at once, so that what is resident is what is in use.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parent.parent
WIDTHS = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
BLOCK_BYTES = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)  # in float32


def peak_growth(folder: Path, num_blocks: int) -> int:
    """Anonymous bytes that a job adds at its peak to what the imports take."""
    folder.mkdir()
    source = write_job(folder, num_hidden_layers=num_blocks, **WIDTHS)
    return watched("support.peak_memory", source, write_text(folder), folder / "out")


def watched(script: str, *arguments: Path) -> int:
    """Anonymous bytes that a script adds at its peak, as it says."""
    paths = [ROOT, ROOT / "evals", ROOT / "kernels", ROOT / "tests"]
    done = subprocess.run(
        [sys.executable, "-m", script, *map(str, arguments)],
        env={**os.environ, **FRUGAL, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, peak = map(int, done.stdout.split())
    return peak - before


def test_fifteen_blocks_take_no_more_memory_than_three(tmp_path: Path) -> None:
    few, many = peak_growth(tmp_path / "few", 3), peak_growth(tmp_path / "many", 15)
    # The model grew by twelve blocks of four bytes a parameter, by six if it stayed in 16 bit.
    assert many - few < 5 * BLOCK_BYTES, f"{few >> 20} MiB with 3 blocks, {many >> 20} with 15"


def test_a_table_of_a_gguf_file_is_nowhere_held_whole_in_float32(tmp_path: Path) -> None:
    rows, columns = 131_072, 256
    config = llama_config(
        vocab_size=rows, hidden_size=columns, num_hidden_layers=1, tie_word_embeddings=True
    )
    write_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    reader, plan = open_and_plan(tmp_path)
    write_plain(tmp_path / "model.gguf", reader, plan, kind="BF16")
    grown = watched("support.peak_of_tables", tmp_path, tmp_path / "model.gguf", tmp_path)
    whole = 4 * rows * columns
    assert grown < whole // 2, f"{grown >> 20} MiB for a table of {whole >> 20}"
