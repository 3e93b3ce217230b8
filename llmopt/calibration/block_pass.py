"""One block over all batches: gather input statistics, or write outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

from llmopt.calibration.hidden_states import HiddenStates
from llmopt.calibration.statistics import ColumnStatistics, InputStatistics, not_finite
from llmopt.calibration.walker import BlockWalker
from llmopt.checkpoint.structure import ModelStructure
from llmopt.errors import BadInputError, NumericalError

Group = tuple[str, ...]
S = TypeVar("S", bound=ColumnStatistics)


class _AllCapturedError(Exception):
    """Ends a block's forward once no wanted input can come any more."""


def collect(
    walker: BlockWalker,
    block: int,
    module: nn.Module,
    inputs: HiddenStates,
    groups: Sequence[Group],
) -> dict[Group, InputStatistics]:
    """:func:`gather` with the second moments that a Hessian is made of."""
    return gather(walker, block, module, inputs, groups, InputStatistics)


def gather(
    walker: BlockWalker,
    block: int,
    module: nn.Module,
    inputs: HiddenStates,
    groups: Sequence[Group],
    kind: type[S],
) -> dict[Group, S]:
    """Run a block over all batches as far as the last wanted group, gathering its inputs.

    An expert that no token is routed to has statistics of no tokens.

    Args:
        walker: started with the batches that `inputs` holds.
        block: the block's index.
        module: the block itself, from `walker.materialise`, with whatever weights it has by now.
        inputs: the block's hidden states.
        groups: input groups of the block (`ModelStructure.input_groups`), at least one.
        kind: what to keep of each group's inputs.

    Raises:
        NumericalError: NaN or infinity in an input; names the layer and the sample.
    """
    assert groups
    layout = walker.structure.layouts[block]
    prefix = walker.structure.block_prefix(block)
    captured: dict[Group, Tensor] = {}
    statistics: dict[Group, S] = {}
    always = {group for group in groups if layout.expert_of(group[0]) is None}
    last = max(layout.input_groups.index(group) for group in groups)
    handles = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _AllCapturedError

    for group in groups:
        statistics[group] = empty_statistics(walker, block, module, group, kind)

        def capture(_: nn.Module, args: tuple[Tensor, ...], group: Group = group) -> None:
            captured[group] = args[0]
            if len(captured) == len(groups):
                raise _AllCapturedError

        handles.append(module.get_submodule(group[0]).register_forward_pre_hook(capture))
    for group in layout.input_groups[last + 1 :]:
        handles.append(module.get_submodule(group[0]).register_forward_pre_hook(stop))
    try:
        for index, batch in enumerate(walker.batches):
            captured.clear()
            with suppress(_AllCapturedError):
                walker.forward(block, module, index, inputs.read(index))
            assert always <= captured.keys(), f"{prefix} ran without {always - captured.keys()}"
            for group, tensor in captured.items():
                statistics[group].update(tensor, batch, index)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def empty_statistics(
    walker: BlockWalker, block: int, module: nn.Module, group: Group, kind: type[S]
) -> S:
    """Statistics of a group's input before the first batch."""
    linear = module.get_submodule(group[0])
    assert isinstance(linear, nn.Linear)
    prefix = walker.structure.block_prefix(block)
    name = ", ".join(f"{prefix}.{path}" for path in group)
    return kind(name, linear.in_features, walker.device)


def check_experts(
    structure: ModelStructure,
    block: int,
    statistics: Mapping[Group, ColumnStatistics],
    min_tokens: int,
) -> None:
    """Hold that every expert among the groups of `statistics` saw at least `min_tokens` tokens.

    Raises:
        BadInputError: names every starved expert with the tokens that it saw.
    """
    layout = structure.layouts[block]
    starved = {
        expert: shared.num_tokens
        for group, shared in statistics.items()
        if (expert := layout.expert_of(group[0])) is not None and shared.num_tokens < min_tokens
    }
    if starved:
        prefix = structure.block_prefix(block)
        raise BadInputError(
            f"the calibration text starves {len(starved)} experts (tokens, at least {min_tokens} "
            "wanted): "
            + ", ".join(f"{prefix}.{expert} ({tokens})" for expert, tokens in starved.items()),
            "calibrate on more text (`num_samples`) or on text nearer to what the model is for; "
            "or leave these experts in 16 bit with `ignore`, or round with `solver: rtn`, or lower "
            "`min_expert_tokens`",
        )


def advance(
    walker: BlockWalker,
    block: int,
    module: nn.Module,
    inputs: HiddenStates,
    outputs: HiddenStates,
) -> None:
    """Run a block over all batches from `inputs` to `outputs` (not flushed here).

    Raises:
        NumericalError: NaN or infinity in an output; names the layer that made it and the sample.
    """
    for index in range(inputs.num_batches):
        output = walker.forward(block, module, index, inputs.read(index))
        check_output(walker, block, module, inputs, index, output)
        outputs.write(index, output)


def check_output(
    walker: BlockWalker,
    block: int,
    module: nn.Module,
    inputs: HiddenStates,
    index: int,
    output: Tensor,
) -> None:
    """Hold that a block's output for batch `index` is finite.

    Raises:
        NumericalError: names the layer that made NaN or infinity, and the sample.
    """
    if not bool(output.isfinite().all()):
        raise _locate(walker, block, module, index, inputs.read(index), output)


def _locate(
    walker: BlockWalker, block: int, module: nn.Module, index: int, hidden: Tensor, output: Tensor
) -> NumericalError:
    """Run the batch again and find the first layer with a finite input and a bad output."""
    prefix = walker.structure.block_prefix(block)
    batch = walker.batches[index]
    if not bool(hidden.isfinite().all()):
        return not_finite(f"the input of {prefix}", hidden, batch, index)
    culprits: list[tuple[str, Tensor]] = []

    def watch(path: str, child: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[object, ...], made: object) -> None:
            given_bad = any(isinstance(a, Tensor) and not bool(a.isfinite().all()) for a in args)
            if isinstance(made, Tensor) and not given_bad and not bool(made.isfinite().all()):
                culprits.append((path, made))

        return child.register_forward_hook(hook)

    leaves = [(path, child) for path, child in module.named_modules() if not any(child.children())]
    handles = [watch(path, child) for path, child in leaves]
    try:
        walker.forward(block, module, index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    path, made = next(iter(culprits), ("", output))
    name = f"{prefix}.{path}" if path else prefix
    if made.shape[:2] != batch.shape:
        made = output
    return not_finite(f"the output of {name}", made, batch, index)
