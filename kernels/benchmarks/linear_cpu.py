"""Linear layers on a CPU: the int4 kernel, the dequantized product, and dense products beside them.

``python kernels/benchmarks/linear_cpu.py [--write-choices]`` prints a table and writes
``results/linear_cpu.json``; with ``--write-choices`` also the crossover that ``linear_w4a16``
follows. Weights rotate, so that they come from memory as in a model, not from a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from llmopt_kernels import linear_w4a16_on_cpu as launcher
from llmopt_kernels.cpu_int4 import CpuInt4Weight, matmul_dequantized, matmul_kernel, to_cpu_int4
from llmopt_kernels.packed_weight import PackedWeight, pack_codes

SHAPES = ((1024, 1024), (2048, 2048), (4096, 2048))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GROUP_SIZE = 128
HOPELESS_MS = 150.0
"""A path that takes so long is not measured at larger batches: nothing here should."""

ROTATED_BYTES = 64 << 20
KERNEL = "int4 kernel"
RESULTS = Path(__file__).parent / "results" / "linear_cpu.json"
CHOICES = Path(launcher.__file__).with_name("linear_w4a16_cpu.json")


class Row(TypedDict):
    """One measurement; times in milliseconds, ``floor_ms`` is bytes of the weight / bandwidth."""

    path: str
    input_dtype: str
    shape: tuple[int, int]
    batch: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    floor_ms: float
    weight_bytes: int


def random_weight(shape: tuple[int, int], seed: int) -> PackedWeight:
    """A 4-bit symmetric weight ``(out, in)``."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(shape[0], shape[1] // GROUP_SIZE, generator=generator) * 0.01 + 0.01
    return PackedWeight(pack_codes(codes, 4), 4, shape[1], scales)


def clock() -> float:
    """Seconds of processor time with one thread (other jobs do not count), of wall time with more.

    Without this a busy machine favours whatever fits into one time slice.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(call: Callable[[int], object], rounds: int, budget_s: float) -> list[float]:
    """Sorted times in ms of ``call(i)``, at most ``rounds`` and about ``budget_s`` seconds."""
    call(0)
    times: list[float] = []
    began = clock()
    while len(times) < rounds and (len(times) < 3 or clock() - began < budget_s):
        start = clock()
        call(len(times))
        times.append((clock() - start) * 1e3)
    return sorted(times)


def read_bandwidth() -> float:
    """Bytes a second at which one pass reads 256 MB, the best of nine."""
    data = torch.ones(64 << 20)
    return data.nbytes / (measure(lambda _: data.sum(), 9, 5.0)[0] / 1e3)


def measure_shape(shape: tuple[int, int], bandwidth: float, rounds: int) -> list[Row]:
    """All paths, element types and batches of one shape."""
    rows: list[Row] = []
    for dtype in launcher.DTYPES:
        int4_bytes = (
            shape[0] * shape[1] // 2 + 2 * shape[0] * shape[1] // GROUP_SIZE * dtype.itemsize
        )
        int4 = [
            to_cpu_int4(random_weight(shape, seed), dtype)
            for seed in range(ROTATED_BYTES // 4 // int4_bytes + 2)
        ]
        dense_bytes = shape[0] * shape[1] * dtype.itemsize
        dense = [
            torch.randn(shape).mul_(0.02).to(dtype) for _ in range(ROTATED_BYTES // dense_bytes + 2)
        ]
        hopeless: set[str] = set()
        for batch in BATCHES:
            x = torch.randn(batch, shape[1]).to(dtype)
            for path, weight_bytes, call in paths(x, int4, int4_bytes, dense, dense_bytes):
                if path in hopeless:
                    continue
                times = measure(call, rounds, 0.3)
                if times[0] > HOPELESS_MS:
                    hopeless.add(path)
                at = [times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8)]
                rows.append(
                    Row(
                        path=path,
                        input_dtype=str(dtype).removeprefix("torch."),
                        shape=shape,
                        batch=batch,
                        p20_ms=round(at[0], 4),
                        p50_ms=round(at[1], 4),
                        p80_ms=round(at[2], 4),
                        floor_ms=round(weight_bytes / bandwidth * 1e3, 4),
                        weight_bytes=weight_bytes,
                    )
                )
                print_row(rows[-1])
    return rows


def paths(
    x: torch.Tensor,
    int4: Sequence[CpuInt4Weight],
    int4_bytes: int,
    dense: Sequence[torch.Tensor],
    dense_bytes: int,
) -> list[tuple[str, int, Callable[[int], object]]]:
    """(name, bytes of the weight, call) of everything that is compared for one input."""
    found: list[tuple[str, int, Callable[[int], object]]] = [
        (KERNEL, int4_bytes, lambda i: matmul_kernel(x, int4[i % len(int4)])),
        ("dense", dense_bytes, lambda i: x @ dense[i % len(dense)].T),
    ]
    for product in dict.fromkeys([x.dtype, torch.float32]):
        name = f"dequantized product in {str(product).removeprefix('torch.')}"
        found.append((name, int4_bytes, partial(dequantized, x, int4, product)))
    return found


def dequantized(
    x: torch.Tensor, int4: Sequence[CpuInt4Weight], product: torch.dtype, i: int
) -> torch.Tensor:
    """The dequantized product with the weight whose turn it is."""
    return matmul_dequantized(x, int4[i % len(int4)], product)


def choices(rows: Sequence[Row]) -> dict[str, dict[str, int | str]]:
    """For each input type: the product type faster at batch 32, and the kernel's largest batch.

    Ratios are averaged (geometric mean) over shapes; the kernel serves every batch up to the last
    one before it first loses.
    """
    found: dict[str, dict[str, int | str]] = {}
    for dtype in dict.fromkeys(row["input_dtype"] for row in rows):
        of_type = [row for row in rows if row["input_dtype"] == dtype]
        products = [p for p in dict.fromkeys(row["path"] for row in of_type) if " in " in p]
        product = min(products, key=lambda path: mean_times(of_type, path).get(32, math.inf))
        kernel, other = mean_times(of_type, KERNEL), mean_times(of_type, product)
        max_rows = 0
        for batch in BATCHES:
            if kernel.get(batch, math.inf) >= other.get(batch, math.inf):
                break
            max_rows = batch
        found[dtype] = {"max_kernel_rows": max_rows, "product_dtype": product.rpartition(" ")[2]}
    return found


def mean_times(rows: Sequence[Row], path: str) -> dict[int, float]:
    """Geometric mean over shapes of the median time, by batch."""
    by_batch: dict[int, list[float]] = {}
    for row in rows:
        if row["path"] == path:
            by_batch.setdefault(row["batch"], []).append(row["p50_ms"])
    full = max(map(len, by_batch.values()))
    return {b: statistics.geometric_mean(t) for b, t in by_batch.items() if len(t) == full}


def environment(bandwidth: float) -> dict[str, object]:
    """What the numbers depend on."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if torch.get_num_threads() == 1 else "wall time",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).date().isoformat(),
    }


def print_row(row: Row) -> None:
    """One line of the table, with its share of the floor."""
    print(
        f"{row['input_dtype']:9} {row['shape']!s:13} batch {row['batch']:4} {row['path']:33} "
        f"p50 {row['p50_ms']:9.3f} ms  ({row['p20_ms']:.3f} .. {row['p80_ms']:.3f})  "
        f"{row['floor_ms'] / row['p50_ms']:6.1%} of the floor",
        flush=True,
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="measurements a row, at most")
    parser.add_argument("--write-choices", action="store_true", help="write the crossover data")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        bandwidth = read_bandwidth()
        about = environment(bandwidth)
        rows = [row for shape in SHAPES for row in measure_shape(shape, bandwidth, options.rounds)]
    measured = {"measured_on": about, "choices": choices(rows)}
    about["load_average_after"] = [round(value, 1) for value in os.getloadavg()]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {**measured, "group_size": GROUP_SIZE, "unit": "ms", "rows": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.write_choices:
        CHOICES.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured["choices"], indent=1))


if __name__ == "__main__":
    main()
