"""Peak memory of the whole road, gate included, does not grow with the number of blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.small_jobs import write_job, write_text

# What is freed goes back to the system at once, so that what is resident is what is in use.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parent.parent
WIDTHS = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
BLOCK_BYTES = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)  # in float32


def peak_growth(folder: Path, num_blocks: int) -> int:
    """Anonymous bytes that a job adds at its peak to what the imports take."""
    folder.mkdir()
    source = write_job(folder, num_hidden_layers=num_blocks, **WIDTHS)
    paths = [ROOT, ROOT / "evals", ROOT / "kernels", ROOT / "tests"]
    arguments = [source, write_text(folder), folder / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "support.peak_memory", *map(str, arguments)],
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
