"""One block's forwards over all batches, stopped at the inputs that a solver waits for.

GPTQ solves a block wave by wave: what a layer's inputs are is decided by the layers before it, as
rounded. Running the block again for every wave multiplies most of its work by the number of waves.
Here a forward stops where it is about to enter the wave's layers, and goes on from there once they
are rounded, so that every operation runs once. A stopped forward is a greenlet: a Python stack that
another one continues from; it holds the activations that the rest of the block needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Self

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from llmopt.calibration.block_pass import Group, S, check_output, empty_statistics, gather
from llmopt.calibration.hidden_states import HiddenStates
from llmopt.calibration.statistics import InputStatistics
from llmopt.calibration.walker import BlockWalker

SMALL_BLOCK_BYTES = 256 << 20
"""A block in float32 and what its stopped forwards hold may take this much in any case."""


class BlockForwards:
    """The forwards of one block; a context, at whose end no forward is left stopped.

    As many batches as fit in ``max_held_bytes`` are stopped and continued, the first ones; the
    others run from the beginning for every wave. The numbers are the same either way.

    Args:
        walker: started with the batches that ``inputs`` holds.
        block: the block's index.
        module: the block itself, from ``walker.materialise``.
        inputs: the block's hidden states.
        max_held_bytes: of activations that stopped forwards may hold together; if None, as much as
            ``inputs`` takes, or more where the block is small (``SMALL_BLOCK_BYTES``).
    """

    def __init__(
        self,
        walker: BlockWalker,
        block: int,
        module: nn.Module,
        inputs: HiddenStates,
        max_held_bytes: int | None = None,
    ) -> None:
        self.walker, self.block, self.module, self.inputs = walker, block, module, inputs
        if max_held_bytes is None:
            block_bytes = 4 * sum(parameter.numel() for parameter in module.parameters())
            max_held_bytes = max(inputs.num_bytes, SMALL_BLOCK_BYTES - block_bytes)
        self._max_held_bytes = max_held_bytes
        self._stopped: dict[int, greenlet] = {}  # by batch
        self._held_bytes: dict[int, int] = {}  # by the same
        self._wanted: Group | None = None
        self._context = ExitStack()

    def __enter__(self) -> Self:
        """Itself, with a hook on the first layer of every group."""
        # A forward that is left half-way has not put the grad mode back: there is one for all.
        self._context.enter_context(torch.no_grad())
        for group in self.walker.structure.input_groups(self.block):

            def stop(_: nn.Module, args: tuple[Tensor, ...], group: Group = group) -> None:
                parent = getcurrent().parent
                if group == self._wanted and parent is not None:
                    parent.switch(args[0])

            handle = self.module.get_submodule(group[0]).register_forward_pre_hook(stop)
            self._context.callback(handle.remove)
        self._context.callback(self._drop_all)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what is stopped, and the hooks."""
        self._context.close()

    def collect(self, groups: Sequence[Group]) -> dict[Group, InputStatistics]:
        """Statistics of the groups' inputs, the block as it is now run from the beginning.

        Raises:
            NumericalError: NaN or infinity in an input; names the layer and the sample.
        """
        return self.gather(groups, InputStatistics)

    def gather(self, groups: Sequence[Group], kind: type[S]) -> dict[Group, S]:
        """The same with statistics of another kind.

        Raises:
            NumericalError: NaN or infinity in an input; names the layer and the sample.
        """
        self._drop_all()
        return gather(self.walker, self.block, self.module, self.inputs, groups, kind)

    def collect_wave(self, groups: Sequence[Group]) -> dict[Group, InputStatistics]:
        """The same, going on from the wave before.

        Waves are asked for in the order of execution, and since the one before nothing was changed
        in the block but its layers. A wave of several groups starts from the beginning: some of its
        layers have run by the time that the last one's inputs are known.

        Raises:
            NumericalError: NaN or infinity in an input; names the layer and the sample.
        """
        layout = self.walker.structure.layouts[self.block]
        if len(groups) != 1 or layout.expert_of(groups[0][0]) is not None:
            return self.collect(groups)
        statistics = empty_statistics(
            self.walker, self.block, self.module, groups[0], InputStatistics
        )
        self._wanted = groups[0]
        for index, batch in enumerate(self.walker.batches):
            run = self._stopped.setdefault(index, greenlet(self._forward))
            statistics.update(run.switch(index), batch, index)
            self._keep_or_drop(index)
        self._wanted = None
        return {groups[0]: statistics}

    def advance(self, outputs: HiddenStates) -> None:
        """Run every batch to its end, into `outputs` (not flushed here).

        Raises:
            NumericalError: NaN or infinity in an output; names the layer that made it and the
                sample.
        """
        for index in range(self.inputs.num_batches):
            run = self._stopped.pop(index, None)
            output = self._forward(index) if run is None else run.switch()
            check_output(self.walker, self.block, self.module, self.inputs, index, output)
            outputs.write(index, output)

    def _forward(self, index: int) -> Tensor:
        return self.walker.forward(self.block, self.module, index, self.inputs.read(index))

    def _keep_or_drop(self, index: int) -> None:
        """Keep a forward that has just stopped, if what all of them hold is not too much."""
        self._held_bytes.pop(index, None)
        held_bytes = _held_bytes(self._stopped[index].gr_frame)
        if sum(self._held_bytes.values()) + held_bytes > self._max_held_bytes:
            self._stopped.pop(index).throw(GreenletExit)
        else:
            self._held_bytes[index] = held_bytes

    def _drop_all(self) -> None:
        for run in self._stopped.values():
            if not run.dead:
                run.throw(GreenletExit)
        self._stopped.clear()
        self._held_bytes.clear()


def _held_bytes(frame: FrameType | None) -> int:
    """Bytes of the tensors that a stack of frames holds, parameters apart."""
    sizes: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (tuple, list)):
            for item in value:
                count(item)

    while frame is not None:
        for value in frame.f_locals.values():
            count(value)
        frame = frame.f_back
    return sum(sizes.values())
