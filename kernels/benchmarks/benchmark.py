"""What is measured: an operation on one problem, and the peers that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Scale = Literal["real", "tiny"]
"""``tiny`` problems run on a CPU in a second: they prove the code, not the kernel."""

Unit = Literal["TFLOP/s", "GB/s"]
Ceiling = Literal["copy", "bf16", "fp8"]
Call = Callable[[], Any]

OURS = "llmopt"


class UnavailableError(Exception):
    """A peer does not run here; the text says why, for its row."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An implementation with its inputs bound, ready to be timed.

    Attributes:
        call: runs it once and returns its output.
        note: what a reader of the row should know.
        capture: whether it is timed inside a CUDA graph. Not so what is slow because of its
            launches and is used that way.
    """

    call: Call
    note: str = ""
    capture: bool = True


Make = Callable[[Any], Prepared]
"""Binds one set of inputs; conversions that happen once at load belong here, outside the time."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """The tile sizes of an operation's kernel on one problem.

    Attributes:
        candidates: every configuration worth a try.
        shipped: what the launcher takes by itself.
        make: binds inputs and a configuration.
    """

    candidates: Sequence[object]
    shipped: object
    make: Callable[[Any, Any], Prepared]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One problem of one operation.

    Attributes:
        operation: the name that kernel, reference, test and benchmark share.
        name: tells the problem apart among those of the operation.
        unit: in which its rate is given.
        ceiling: what bounds it: the copy bandwidth, or the peak of the matrix unit.
        num_bytes: that must move at least: every input read once, every output written once.
        num_flops: floating-point (or integer) operations, two a multiply-add.
        build: one set of inputs from a device and a seed. It is called several times, so that
            inputs come from memory and not from a cache.
        ours: the operation.
        expected: the reference's output, in higher precision.
        tolerance: of the relative error by norm.
        part: of an implementation's output, what ``expected`` covers.
        peers: by name; each computes the same from the same inputs.
        peer_slack: times ``tolerance``; a peer further off computes something else.
        tunable: where the kernel has a choice of tile sizes.
        priority: 0 for what a goal rests on; measured first.
        estimated_s: what building and checking takes, times aside.
    """

    operation: str
    name: str
    unit: Unit
    ceiling: Ceiling
    num_bytes: int
    num_flops: int
    build: Callable[[torch.device, int], Any]
    ours: Make
    expected: Callable[[Any], Tensor]
    tolerance: float
    part: Callable[[Any], Tensor] = lambda output: output
    peers: Mapping[str, Make] = field(default_factory=dict)
    peer_slack: float = 4.0
    tunable: Tunable | None = None
    priority: int = 1
    estimated_s: float = 3.0

    @property
    def key(self) -> str:
        """Names it in journals and on the command line."""
        return f"{self.operation}/{self.name}"

    def rate(self, time_ms: float) -> float:
        """The rate in ``unit`` of one run that takes ``time_ms``."""
        if self.unit == "GB/s":
            return self.num_bytes / time_ms / 1e6
        return self.num_flops / time_ms / 1e9
