"""How a decoder block reacts to rescaled channels: one watched run, and probes against it.

All of it in float32: in 16 bit, who reads a channel past the layers is lost in rounding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# Rounding in float32, no more: powers of two are exact, and inputs are put back.
_TOLERANCE = 8 * torch.finfo(torch.float32).eps
_EXPONENTS = (-2.0, -1.0, 1.0, 2.0)

Run = Callable[[], Tensor]
Readers = tuple[tuple[str, ...], Tensor]
"""Reader modules, and the channel of each of their columns ``(in,) int64``."""


def role_of(path: str) -> str:
    """A module's path with the indices of experts left out: ``mlp.experts.*.up_proj``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


@dataclass(slots=True)
class Baseline:
    """An undisturbed run.

    Attributes:
        inputs: by reader, or norm.
        readers: in order of execution.
        producers: the same; each with how many readers came before it.
        output: the block's.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    readers: dict[str, nn.Module] = field(default_factory=dict)
    producers: dict[str, tuple[nn.Module, int]] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    def roles(self) -> dict[str, list[str]]:
        """Producers that differ in an expert's index alone, together."""
        roles: dict[str, list[str]] = {}
        for path in self.producers:
            roles.setdefault(role_of(path), []).append(path)
        return roles


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Widen a block's tensors for a while: what was not changed is as before afterwards.

    A tensor at a time, so that the narrow ones do not stay beside them.
    """
    narrow = [
        (tensor, tensor.dtype)
        for tensor in (*block.parameters(), *block.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


def watch_run(block: nn.Module, run: Run) -> Baseline:
    """Run the block undisturbed and note who reads what."""
    baseline = Baseline()
    repeated: set[str] = set()

    def watch(path: str, module: nn.Module, weight: Tensor) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[object, ...], made: object) -> None:
            given = args[0] if args else None
            if path in baseline.inputs:
                repeated.add(path)  # its weights act twice; a probe would see only the last time
            if not isinstance(given, Tensor) or given.shape[-1] != weight.shape[-1]:
                return
            baseline.inputs[path] = given.clone()
            if weight.ndim == 2:
                baseline.readers[path] = module
            width = made.shape[-1] if isinstance(made, Tensor) else None
            if width == weight.shape[0] and (weight.ndim == 1 or isinstance(module, nn.Linear)):
                baseline.producers[path] = (module, len(baseline.readers))

        return module.register_forward_hook(hook)

    handles = [
        watch(path, module, module.weight)
        for path, module in block.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and not any(module.children())
        and module.weight.ndim in (1, 2)
    ]
    with _hooked(handles):
        baseline.output = run()
    for path in repeated:
        baseline.producers.pop(path, None)
    return baseline


@contextmanager
def _hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_factors(count: int, generator: torch.Generator) -> Tensor:
    """``(count,) float32`` powers of two, none of them 1."""
    picks = torch.randint(len(_EXPONENTS), (count,), generator=generator)
    return torch.exp2(torch.tensor(_EXPONENTS)[picks])


class _DisturbedError(Exception):
    """Ends a probe at a reader whose input changed otherwise than channel by channel."""


def probe(
    block: nn.Module,
    run: Run,
    baseline: Baseline,
    factors: Mapping[str, Tensor],
    first: int,
) -> dict[str, Readers] | str:
    """Multiply each producer's rows from ``first`` on; its readers, or why it has none."""
    found: dict[str, list[tuple[str, Tensor]]] = {path: [] for path in factors}

    def multiply(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: object, made: Tensor) -> Tensor:
            scaled = made.clone()
            scaled[..., first : first + len(factors[path])] *= factors[path]
            return scaled

        return baseline.producers[path][0].register_forward_hook(hook)

    def put_back(path: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        expected = baseline.inputs[path]

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[object, ...] | None:
            if _close(args[0], expected):
                return None
            for producer in sorted(factors, key=lambda other: -_common(path, other)):
                channels = _channels(args[0], expected, factors[producer])
                if channels is not None:
                    found[producer].append((path, channels))
                    return (expected, *args[1:])
            raise _DisturbedError(f"{role_of(path)} does not take it up channel by channel")

        return module.register_forward_pre_hook(hook)

    handles = [multiply(path) for path in factors]
    handles += [put_back(path, module) for path, module in baseline.readers.items()]
    with _hooked(handles):
        try:
            output = run()
        except _DisturbedError as error:
            return str(error)
    if not _close(output, baseline.output):
        return "it reaches the block's output"
    return _checked(baseline, factors, found)


def _checked(
    baseline: Baseline,
    factors: Mapping[str, Tensor],
    found: Mapping[str, list[tuple[str, Tensor]]],
) -> dict[str, Readers] | str:
    """The same by producer with one channel map; each reader must go by its weight's columns."""
    folds: dict[str, Readers] = {}
    for producer, readers in found.items():
        if not readers:
            return "no linear layer takes it up"
        channels = readers[0][1]
        for path, others in readers:
            if not torch.equal(others, channels):
                return (
                    f"{role_of(path)} orders its channels otherwise than {role_of(readers[0][0])}"
                )
            module = baseline.readers[path]
            if not isinstance(module, nn.Linear) and not _reads_columns(
                module, baseline.inputs[path], factors[producer][channels]
            ):
                return f"{role_of(path)} uses its input otherwise than through its weight"
        folds[producer] = (tuple(path for path, _ in readers), channels)
    return folds


def _common(path: str, other: str) -> int:
    return len(os.path.commonprefix([path, other]))


def _channels(given: Tensor, expected: Tensor, factors: Tensor) -> Tensor | None:
    """The channel of each column, if ``given = expected * factors[channels]`` for some order.

    Columns are channels, or heads of channels repeated for the query heads that share them.
    """
    count, columns = len(factors), expected.shape[-1]
    if columns % count:
        return None
    indices = torch.arange(count, device=expected.device)
    sizes = [count] if columns == count else [size for size in range(count, 0, -1)]
    for size in sizes:
        if count % size:
            continue
        heads = indices.view(-1, size).repeat_interleave(columns // count, dim=0)
        channels = heads.reshape(-1)
        if _close(given, expected * factors[channels]):
            return channels
    return None


def _close(given: Tensor, expected: Tensor) -> bool:
    """Equal up to float32's rounding, each channel in units of its own largest value."""
    if given.shape != expected.shape:
        return False
    difference = (given - expected).abs().flatten(0, -2)
    largest = expected.abs().flatten(0, -2).amax(dim=0)
    return bool((difference <= _TOLERANCE * largest).all())


@contextmanager
def _weight_changed(module: nn.Module, change: Callable[[Tensor], object]) -> Iterator[None]:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    before = weight.data.clone()
    change(weight.data)
    try:
        yield
    finally:
        weight.data.copy_(before)


def norm_offset(module: nn.Module, given: Tensor) -> float | None:
    """The ``c`` of a module that computes ``n(x) * (c + weight) + bias``; None if it does not."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    with _weight_changed(module, lambda data: data.zero_()):
        zero = module(given) - (0 if bias is None else bias)
    with _weight_changed(module, lambda data: data.fill_(1)):
        unit = module(given) - (0 if bias is None else bias) - zero
    total = float(unit.double().square().sum())
    if total == 0.0:
        return None
    offset = float(round(float((zero.double() * unit.double()).sum()) / total))
    expected = unit * (offset + weight) + (0 if bias is None else bias)
    return offset if _close(expected, module(given)) else None


def _reads_columns(module: nn.Module, given: Tensor, factors: Tensor) -> bool:
    """Whether scaling the columns of its weight undoes scaling its input."""
    before = module(given)
    with _weight_changed(module, lambda data: data.mul_(factors)):
        after = module(given / factors)
    return _same(before, after)


def _same(before: object, after: object) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.is_floating_point():
            return _close(after, before)
        return torch.equal(before, after)
    if isinstance(before, (tuple, list)) and isinstance(after, (tuple, list)):
        return len(before) == len(after) and all(map(_same, before, after))
    return before is after
