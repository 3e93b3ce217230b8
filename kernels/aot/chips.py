"""Chips by compute capability, and the tools that read what was compiled for them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True, slots=True)
class Chip:
    """What a kernel may use.

    Attributes:
        capability: compute capability times ten, or the name of an AMD architecture.
        max_shared_bytes: of shared memory a block, opted in.
        max_stack_bytes: a thread; more than a few are spilled registers.
        tensor_core: instruction, in PTX or AMD assembly, that shows its matrix unit in use.
        warp_size: threads.
    """

    capability: int | str
    max_shared_bytes: int
    max_stack_bytes: int
    tensor_core: re.Pattern[str]
    warp_size: int = 32

    @property
    def target(self) -> GPUTarget:
        """As triton's compiler names it."""
        backend = "cuda" if isinstance(self.capability, int) else "hip"
        return GPUTarget(backend, self.capability, self.warp_size)


# Shared memory: NVIDIA, CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability"; AMD, CDNA 3 ISA, local data share.
A100 = Chip(80, 166_912, 64, re.compile(r"\bmma\.sync"))
H100 = Chip(90, 232_448, 0, re.compile(r"\b(wgmma\.mma_async|mma\.sync)"))
MI300 = Chip("gfx942", 65_536, 0, re.compile(r"\bv_mfma"), 64)
CHIPS: dict[int | str, Chip] = {chip.capability: chip for chip in (A100, H100, MI300)}


class StubDriver:
    """Stands in for the driver of a GPU that is not here; the JIT asks it what to compile for."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        """The chip."""
        return self.chip.target

    def get_current_device(self) -> int | str:
        """A cache key: one for each chip."""
        return self.chip.capability

    def get_current_stream(self, device: object = None) -> int:
        """No stream."""
        return 0


def use(chip: Chip) -> None:
    """Compile for ``chip`` from now on."""
    triton.runtime.driver.set_active(StubDriver(chip))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel uses of a chip: registers a thread, bytes."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_cores: bool

    def faults(self, chip: Chip, needs_tensor_cores: bool) -> list[str]:
        """Why it must not ship; empty if it may."""
        found = []
        if self.shared_bytes > chip.max_shared_bytes:
            found.append(
                f"{self.shared_bytes} bytes of shared memory, limit {chip.max_shared_bytes}"
            )
        if self.stack_bytes > chip.max_stack_bytes:
            found.append(f"{self.stack_bytes} bytes of stack, limit {chip.max_stack_bytes}")
        if needs_tensor_cores and not self.tensor_cores:
            found.append("no tensor-core instruction")
        return found


def usage(kernel: Any, chip: Chip) -> Usage:
    """Read what ``kernel`` uses out of its binary (NVIDIA) or its assembly (AMD)."""
    if isinstance(chip.capability, int):
        registers, stack = _resources(kernel.asm["cubin"])
        text = kernel.asm["ptx"]
    else:
        text = kernel.asm["amdgcn"]
        registers = int(_first(r"\.vgpr_count:\s+(\d+)", text))
        stack = 4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", text))
    matrix = bool(chip.tensor_core.search(text))
    return Usage(registers, stack, int(kernel.metadata.shared), matrix)


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    text = done.stdout + done.stderr
    return int(_first(r"REG:(\d+)", text)), int(_first(r"STACK:(\d+)", text))


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in what the tool printed"
    return found.group(1)
