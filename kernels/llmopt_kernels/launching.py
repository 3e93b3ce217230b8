"""What every launcher does: check what it got, and launch (or, ahead of time, compile)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from llmopt_kernels.triton_or_stub import triton

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]

_compiled: ContextVar[list[Any] | None] = ContextVar("compiled", default=None)


def runs_kernel(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` goes through its kernel; elsewhere the reference serves.

    torch calls AMD's GPUs ``cuda`` too.
    """
    return tensor.device.type == "cuda" or _compiled.get() is not None


def launch(kernel: Any, grid: Grid, *arguments: object, **options: object) -> None:
    """Launch ``kernel[grid](*arguments, **options)`` on the device that its tensors are on.

    Inside ``compiling`` the kernel is only compiled.
    """
    sink = _compiled.get()
    if sink is not None:
        sink.append(kernel.warmup(*arguments, grid=(1,), **options))
        return
    device = next(given.device for given in arguments if isinstance(given, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


def architecture(device: torch.device) -> int | str:
    """What a launch on ``device`` is compiled for.

    Returns:
        Compute capability times ten, or the name of an AMD architecture.
    """
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if device.type == "cpu":  # in the interpreter any will do
        return 80
    name: int | str = triton.runtime.driver.active.get_current_target().arch
    return name


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Launchers called inside compile their kernels and run nothing; gives the compiled kernels.

    Their tensors may be on the ``meta`` device: only types, strides and shapes are read.
    """
    sink: list[Any] = []
    token = _compiled.set(sink)
    try:
        yield sink
    finally:
        _compiled.reset(token)


def check_launchable(**tensors: Tensor | None) -> None:
    """Hold that all tensors are on one device that can run a kernel.

    Raises:
        ValueError: several devices, a CPU without triton's interpreter, or fp8 on a GPU without it.
    """
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors are on several devices: {_listed(devices)}")
    for name, tensor in tensors.items():
        if tensor is not None:
            check_chip_has(name, tensor.dtype, tensor.device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if "cpu" in devices.values() and not interpreted:
        raise ValueError(
            "a kernel runs on a GPU and the tensors are on the CPU; call the operation itself, "
            "which takes the reference there, or set TRITON_INTERPRET=1 before triton is imported"
        )


def check_chip_has(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Hold that kernels on ``device`` can read and write elements of ``dtype``.

    For outputs; ``check_launchable`` does it for inputs.

    Raises:
        ValueError: fp8 on a GPU without it; says which GPU.
    """
    if dtype != torch.float8_e4m3fn or device.type != "cuda":
        return
    if refusal := fp8_refusal(torch.cuda.get_device_capability(device)):
        raise ValueError(f"{name} is float8_e4m3fn: {refusal}")


def fp8_refusal(capability: tuple[int, int]) -> str | None:
    """Why kernels cannot read or write fp8 e4m3 on a chip; ``None`` if they can."""
    if capability >= (8, 9):
        return None
    major, minor = capability
    return f"this GPU has compute capability {major}.{minor}, and fp8 needs 8.9"


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Hold that ``tensor`` has one of the ``allowed`` element types.

    Raises:
        ValueError: another one; says which.
    """
    if tensor.dtype not in allowed:
        some = ", ".join(_short(dtype) for dtype in allowed)
        raise ValueError(f"{name} is {_short(tensor.dtype)}; use {some}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Hold that ``tensor`` has ``shape``, ``None`` standing for any size.

    Raises:
        ValueError: another shape; says which was expected and which was got.
    """
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{expected}]")


def check_last_contiguous(name: str, tensor: Tensor) -> None:
    """Hold that neighbours in the last dimension are neighbours in memory.

    Raises:
        ValueError: another stride; says which.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1 "
            "(.contiguous() makes a copy that is)"
        )


def check_writable(name: str, tensor: Tensor) -> None:
    """Hold that no two elements of a tensor written in place are one in memory by expansion.

    Raises:
        ValueError: a stride of 0; says which strides.
    """
    if any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name} has strides {tensor.stride()} and is written in place; none may be 0 "
            "(.contiguous() makes a copy that has none)"
        )


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Hold that ``value`` is one of those ``allowed``.

    Raises:
        ValueError: another one; says which.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(devices: dict[str, str]) -> str:
    return ", ".join(f"{name} on {device}" for name, device in devices.items())
