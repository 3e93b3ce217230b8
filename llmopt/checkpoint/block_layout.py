"""Which linear layers a decoder block has, in execution order, and which share an input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmopt.checkpoint.experts import LinearExperts
from llmopt.checkpoint.shell import BlockCall
from llmopt.errors import BadInputError


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One decoder block's linear layers.

    Attributes:
        linear_names: module names relative to the block, in order of execution.
        input_groups: the same names, grouped where the very same tensor is their input.
        experts: module names of the :class:`LinearExperts`, relative to the block.
    """

    linear_names: tuple[str, ...]
    input_groups: tuple[tuple[str, ...], ...]
    experts: tuple[str, ...] = ()

    @property
    def waves(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The input groups, those of all experts together, in order of execution.

        Experts do not see one another's outputs: all their gates and ups are one wave, all their
        downs another, and every other group is a wave of its own.
        """
        waves: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for group in self.input_groups:
            waves.setdefault(tuple(map(self._role, group)), []).append(group)
        return tuple(tuple(groups) for groups in waves.values())

    def expert_of(self, linear: str) -> str | None:
        """The expert that a linear layer belongs to: `mlp.experts.3`; None outside of experts."""
        for experts in self.experts:
            if linear.startswith(f"{experts}."):
                return f"{experts}.{linear.removeprefix(f'{experts}.').partition('.')[0]}"
        return None

    def _role(self, linear: str) -> str:
        """What all experts call a layer: `mlp.experts.*.gate_proj`."""
        expert = self.expert_of(linear)
        if expert is None:
            return linear
        return f"{expert.rpartition('.')[0]}.*{linear.removeprefix(expert)}"


def watch_block(block: nn.Module, name: str, call: BlockCall, hidden: Tensor) -> BlockLayout:
    """Run `block` once and watch its linear layers; all of it may be on the meta device.

    Args:
        block: the decoder block.
        name: its full name, for errors.
        call: what it is called with besides `hidden`.
        hidden: (batch, tokens, hidden).

    Raises:
        BadInputError: the forward needs values, leaves a linear layer unused, or does not
            return hidden states of the same shape.
    """
    seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that identities stay unique
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.append((path, args[0])))
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            output = block(hidden, *call.args, **call.kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise BadInputError(
            f"decoder block {name} ({type(block).__name__}) cannot be run on its own: {error}",
            "llmopt does not know this architecture yet",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor) or output.shape != hidden.shape:
        raise BadInputError(
            f"decoder block {name} ({type(block).__name__}) does not map hidden states to hidden "
            "states of the same shape",
            "llmopt does not know this architecture yet",
        )
    unused = [
        path
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and path not in {used for used, _ in seen}
    ]
    if unused:
        raise BadInputError(
            f"decoder block {name} does not use its linear layers {', '.join(unused[:5])}",
            "llmopt does not know this architecture yet",
        )
    groups: dict[int, list[str]] = {}
    for path, tensor in seen:
        groups.setdefault(id(tensor), []).append(path)
    input_groups = tuple(tuple(dict.fromkeys(group)) for group in groups.values())
    return BlockLayout(
        linear_names=tuple(dict.fromkeys(path for path, _ in seen)),
        input_groups=input_groups,
        experts=tuple(
            path for path, module in block.named_modules() if isinstance(module, LinearExperts)
        ),
    )
