"""What the chip can do at most, measured in the same run: bytes copied, products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.benchmark import Call, Ceiling, Scale
from benchmarks.timing import Timer

COPIED_BYTES = {"real": 4 << 30, "tiny": 1 << 16}
MATRIX = {"real": 8192, "tiny": 64}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates at the median time.

    Attributes:
        copy: GB/s of a large copy on the device, bytes read plus bytes written.
        bf16: TFLOP/s of cuBLAS's product of bf16 matrices, random data.
        fp8: TFLOP/s of ``torch._scaled_mm`` on e4m3, fast accumulation; ``None`` where it does not
            run.
        notes: by name, why one is missing.
    """

    copy: float | None
    bf16: float | None
    fp8: float | None
    notes: dict[str, str]

    def rate(self, ceiling: Ceiling) -> float | None:
        """The ceiling by name, in GB/s or TFLOP/s."""
        return {"copy": self.copy, "bf16": self.bf16, "fp8": self.fp8}[ceiling]

    def floor_ms(self, num_bytes: int, num_flops: int, ceiling: Ceiling) -> float | None:
        """The least time that bytes and operations leave; ``None`` if a ceiling is missing."""
        matrix = self.fp8 if ceiling == "fp8" else self.bf16
        if self.copy is None or matrix is None:
            return None
        return max(num_bytes / self.copy / 1e6, num_flops / matrix / 1e9)


def measure_ceilings(
    device: torch.device, timer: Timer, scale: Scale, seconds: float = 0.5
) -> Ceilings:
    """Measure all three; a ceiling that cannot be measured is ``None`` with a note."""
    size = MATRIX[scale]
    found: dict[str, float | None] = {}
    notes: dict[str, str] = {}

    def measure(name: str, work: float, make: Callable[[], Call]) -> None:
        try:
            time_ms = timer([make()], seconds).percentile(50)
        except Exception as error:  # whatever is missing here, the other ceilings still stand
            found[name] = None
            notes[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            found[name] = work / time_ms

    copied = COPIED_BYTES[scale]
    measure("copy", 2 * copied / 1e6, lambda: _copy(device, copied))
    measure("bf16", 2 * size**3 / 1e9, lambda: _bf16(device, size))
    measure("fp8", 2 * size**3 / 1e9, lambda: _fp8(device, size))
    return Ceilings(found["copy"], found["bf16"], found["fp8"], notes)


def _copy(device: torch.device, num_bytes: int) -> Call:
    source = torch.randint(-(2**31), 2**31 - 1, (num_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _bf16(device: torch.device, size: int) -> Call:
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return lambda: a @ b.t()


def _fp8(device: torch.device, size: int) -> Call:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
