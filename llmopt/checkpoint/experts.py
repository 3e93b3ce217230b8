"""A mixture's experts as plain linear layers, where transformers fuses them in two parameters.

transformers 5 holds all experts of a block as ``gate_up_proj (experts, 2 * inner, hidden)`` and
``down_proj (experts, hidden, inner)``. Solvers, formats and checkpoints know linear layers, one for
each expert, so the skeleton's fused modules make way for :class:`LinearExperts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FUSED_NAMES = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj"})


class GatedExpert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``; :class:`LinearExperts` runs it in two steps.

    Args:
        hidden_size: width of its inputs and outputs.
        inner_size: width between the projections.
        act_fn: the activation, shared by all experts.
    """

    def __init__(self, hidden_size: int, inner_size: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.act_fn = act_fn

    def widen(self, hidden_states: Tensor) -> Tensor:
        """``(tokens, hidden)`` to ``(tokens, inner)``: all that comes before ``down_proj``."""
        widened: Tensor = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return widened


class LinearExperts(nn.Module):
    """All experts of a block; children ``0``, ``1``, ... are :class:`GatedExpert`.

    It stands where the fused module stood and is called as that is.

    Attributes:
        every_token: every expert sees all tokens, those of others with weight zero: for watching
            the layers. On the meta device, where routing has no values, it is always so.

    Args:
        num_experts: how many there are.
        hidden_size: width of inputs and outputs.
        inner_size: width within an expert.
        act_fn: the activation.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, act_fn: nn.Module
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.every_token = False
        for index in range(num_experts):
            self.add_module(str(index), GatedExpert(hidden_size, inner_size, act_fn))

    @property
    def experts(self) -> Iterator[GatedExpert]:
        """The experts, by index."""
        for expert in self.children():
            assert isinstance(expert, GatedExpert)
            yield expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token through its experts, summed with its weights.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k) int64, the experts of each token; ``num_experts`` is none.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, hidden) in the type of ``hidden_states``.
        """
        everything = self.every_token or hidden_states.is_meta
        shares = (
            self._of_every_token(top_k_index, top_k_weights)
            if everything
            else self._of_routed_tokens(top_k_index, top_k_weights)
        )
        # All that narrows comes after all that widens, so that who watches the one can stop there.
        widened = [
            (expert, tokens, weights, expert.widen(hidden_states[tokens]))
            for expert, (tokens, weights) in zip(self.experts, shares, strict=True)
            if tokens is not None
        ]
        summed = torch.zeros_like(hidden_states)
        for expert, tokens, weights, inner in widened:
            part = (expert.down_proj(inner) * weights[:, None]).to(summed.dtype)
            if isinstance(tokens, Tensor):
                summed.index_add_(0, tokens, part)
            else:
                summed += part
        return summed

    def _of_every_token(
        self, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        # A slice makes a tensor of its own for every expert: no two experts share an input.
        for index in range(self.num_experts):
            yield slice(None), (top_k_weights * (top_k_index == index)).sum(dim=-1)

    def _of_routed_tokens(
        self, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        chosen, flat_weights = top_k_index.flatten(), top_k_weights.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)
        ends = counts.cumsum(dim=0).tolist()
        for index in range(self.num_experts):
            mine = order[ends[index - 1] if index else 0 : ends[index]]
            tokens = mine // top_k_index.shape[1] if len(mine) else None
            yield tokens, flat_weights[mine]


def split_experts(skeleton: PreTrainedModel) -> None:
    """Replace every fused experts module of a model on the meta device by linear layers.

    They are known by their parameters' names and shapes, not by their class.

    Raises:
        BadInputError: experts that are fused in another layout (transposed, with biases, ...).
    """
    for name, module in list(skeleton.named_modules()):
        shapes = {
            key: tuple(parameter.shape)
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        if not any(key in _FUSED_NAMES and len(shape) == 3 for key, shape in shapes.items()):
            continue
        why = _other_layout(module, shapes)
        if why is not None:
            raise BadInputError(
                f"the experts of {name} ({type(module).__name__}) are held in a way that llmopt "
                f"does not read: {why}",
                "llmopt reads experts of gate_proj, up_proj and down_proj without biases "
                "(Mixtral, Qwen3-MoE and their like)",
            )
        num_experts, hidden_size, inner_size = shapes["down_proj"]
        act_fn = module.act_fn
        assert isinstance(act_fn, nn.Module)
        with torch.device("meta"):
            experts = LinearExperts(num_experts, hidden_size, inner_size, act_fn)
        skeleton.set_submodule(name, experts.eval().requires_grad_(False))


def _other_layout(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Why a fused module does not compute what :class:`LinearExperts` does; None if it does."""
    if shapes.keys() != {"gate_up_proj", "down_proj"}:
        return f"its parameters are {', '.join(sorted(shapes))}"
    gate_up, down = shapes["gate_up_proj"], shapes["down_proj"]
    if len(down) != 3 or gate_up != (down[0], 2 * down[2], down[1]):
        return f"gate_up_proj {list(gate_up)} and down_proj {list(down)} are transposed or mixed"
    if not getattr(module, "is_concatenated", True):
        return "the rows of gate and up alternate"
    if any(module.children()) and list(module._modules) != ["act_fn"]:
        return f"it has parts besides act_fn: {', '.join(module._modules)}"
    if not isinstance(getattr(module, "act_fn", None), nn.Module):
        return "it has no activation act_fn"
    if not _has_plain_gate(module):
        return f"{type(module).__name__} has a gate of its own"
    return None


def _has_plain_gate(module: nn.Module) -> bool:
    """Whether gate and up meet as ``act(gate) * up``, which transformers gives who says nothing."""
    from transformers.integrations import moe

    gate = getattr(type(module), "_apply_gate", None)
    return gate is None or gate.__module__ == moe.__name__
