"""From modules on the meta device to modules with values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadParameter = Callable[[str], Tensor]
_Module = TypeVar("_Module", bound=nn.Module)


def shallow_copy(module: _Module) -> _Module:
    """A module with the same children, whose children can be replaced without touching `module`."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def initialise_buffers(
    module: nn.Module, skeleton: PreTrainedModel, device: torch.device | str
) -> None:
    """Give every buffer that no checkpoint holds (rotary frequencies, scales) its value.

    Call before parameters are real: transformers' initialiser writes to them too.

    Raises:
        BadInputError: a buffer that transformers has no value for.
    """
    for name, owner in module.named_modules():
        pending = [
            key
            for key in owner._non_persistent_buffers_set
            if (buffer := owner._buffers[key]) is not None and buffer.is_meta
        ]
        for key in pending:
            buffer = owner._buffers[key]
            assert buffer is not None
            fill = float("nan") if buffer.is_floating_point() else 0
            owner._buffers[key] = torch.full_like(buffer, fill, device="cpu")
        if pending:
            skeleton._init_weights(owner)  # type: ignore[no-untyped-call]  # transformers'
        for key in pending:
            buffer = owner._buffers[key]
            assert buffer is not None
            if buffer.is_floating_point() and bool(buffer.isnan().any()):
                raise BadInputError(
                    f"buffer {name}.{key} of {type(skeleton).__name__} has no initial value",
                    "this architecture needs support in llmopt; report it",
                )
            owner._buffers[key] = buffer.to(device)


def load_parameters(module: nn.Module, prefix: str, read_parameter: ReadParameter) -> None:
    """Replace meta parameters and persistent buffers by `read_parameter(memory name)`.

    `prefix` is the module's own memory name.
    """
    for path, owner in module.named_modules():
        owner_name = f"{prefix}.{path}" if path else prefix
        for key in owner._parameters:
            if owner._parameters[key] is not None:
                value = read_parameter(f"{owner_name}.{key}")
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
        for key in owner._buffers.keys() - owner._non_persistent_buffers_set:
            if owner._buffers[key] is not None:
                owner._buffers[key] = read_parameter(f"{owner_name}.{key}")
