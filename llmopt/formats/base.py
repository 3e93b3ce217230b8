"""What a format is: the bridge between a quantized tensor and the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pydantic import JsonValue
from torch import Tensor

from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme


class SchemeTable(Protocol):
    """Which scheme a checkpoint's config gives to which module."""

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer, or ``None`` where it is not quantized."""
        ...


class Format(Protocol):
    """One layout of quantized weights on disk; pure, no files opened."""

    @property
    def name(self) -> str:
        """The name recipes use."""
        ...

    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot hold ``scheme``, or ``None`` if it can."""
        ...

    def pack(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The checkpoint tensors, by full name, that stand for ``module``'s weight."""
        ...

    def unpack(self, module: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedTensor:
        """The inverse of :meth:`pack`; ``read`` gives a checkpoint tensor by its full name."""
        ...

    def weight_name(self, tensor_name: str) -> tuple[str, bool] | None:
        """``(module, leads)`` if the tensor is part of a packed weight, else ``None``.

        Exactly one tensor of each packed weight leads.
        """
        ...

    def weight_shape(self, module: str, read: Callable[[str], Tensor]) -> tuple[int, int]:
        """Logical ``(out, in)`` of a packed weight."""
        ...

    def config(self, schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, JsonValue]:
        """What goes into ``config.json`` as ``quantization_config``.

        ``schemes`` maps each quantized linear layer to its scheme; ``ignored`` names the linear
        layers that are not quantized, as their consumers look them up.
        """
        ...

    def schemes(self, config: Mapping[str, JsonValue]) -> SchemeTable:
        """The inverse of :meth:`config`; raises BadInputError on what the format cannot read."""
        ...
