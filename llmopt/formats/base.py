"""What a format is: the bridge between a quantized tensor and the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
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

    @property
    def checkpoint_format(self) -> str | None:
        """The variant of the format that is written, ``None`` where there is one only."""
        ...

    @property
    def takes_patterns(self) -> bool:
        """Whether its config may name layers by regular expressions (``re:...``).

        If not, its readers take an ignored name as a part of the names that it stands for.
        """
        ...

    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot hold ``scheme``, or ``None`` if it can."""
        ...

    def shape_refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold a weight of ``shape (out, in)``, or ``None`` if it can."""
        ...

    def mixture_refusal(self, schemes: Collection[Scheme]) -> str | None:
        """Why one checkpoint cannot hold all of ``schemes``, or ``None`` if it can."""
        ...

    def bits_per_weight(
        self, scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> float:
        """Bits that a weight of ``shape (out, in)`` takes on disk, scales and all."""
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

    def weight_shape(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """Logical ``(out, in)`` of a packed weight."""
        ...

    def config(self, schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, JsonValue]:
        """What goes into ``config.json`` as ``quantization_config``.

        ``schemes`` maps each quantized linear layer to its scheme; ``ignored`` names the linear
        layers that are not quantized, as their consumers look them up.
        """
        ...

    def companion_files(
        self, config: Mapping[str, JsonValue]
    ) -> dict[str, Mapping[str, JsonValue]]:
        """JSON files, by name, that its readers look for beside ``config.json``.

        ``config`` is what :meth:`config` gave.
        """
        ...

    def schemes(self, config: Mapping[str, JsonValue]) -> SchemeTable:
        """The inverse of :meth:`config`; raises BadInputError on what the format cannot read."""
        ...
