"""Walks a checkpoint's decoder blocks in order; one block is in memory at a time."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmopt.calibration.head import Head
from llmopt.calibration.hidden_states import HiddenStates
from llmopt.checkpoint.materialise import initialise_buffers, load_parameters
from llmopt.checkpoint.shell import BlockCall, BodyShell, TokenBatch
from llmopt.checkpoint.structure import ModelStructure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import BadInputError

_REMEMBERED_SHAPES = 8  # a call holds a mask of tokens x tokens; texts come in many lengths

__all__ = ["BlockWalker", "TokenBatch", "calibration_walker"]


class BlockWalker:
    """Materialise a block, run it over hidden states, release it.

    Args:
        structure: of the checkpoint, or of the one that `source` stands for.
        source: the weights, under the checkpoint's names.
        device: where blocks compute.
        dtype: of weights and activations; float32 on a CPU and the source's own elsewhere if None.
    """

    def __init__(
        self,
        structure: ModelStructure,
        source: TensorSource,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.structure = structure
        self.source = source
        self.device = torch.device(device)
        self.dtype = dtype or (
            torch.float32
            if self.device.type == "cpu"
            else source.info(structure.embed_disk_name).dtype
        )
        self.batches: tuple[TokenBatch, ...] = ()
        anatomy = structure.anatomy
        self._shell = BodyShell(
            structure.skeleton,
            anatomy.body,
            anatomy.blocks,
            anatomy.embedding,
            (anatomy.final_norm,),
            read_parameter=self._read,
            read_rows=self._read_rows,
            device=self.device,
            dtype=self.dtype,
        )
        self._calls: OrderedDict[tuple[int, int], tuple[BlockCall, ...]] = OrderedDict()

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, tokens) of every batch."""
        return tuple(batch.shape for batch in self.batches)

    def start(self, batches: Sequence[TokenBatch], into: HiddenStates) -> None:
        """Take `batches` on the walk; write every batch's input of block 0 to `into`.

        Raises:
            BadInputError: a token id that the embedding does not have.
        """
        self.resume(batches)
        for index, batch in enumerate(self.batches):
            into.write(index, self._shell.run(batch).hidden)

    def resume(self, batches: Sequence[TokenBatch]) -> None:
        """Take `batches` on a walk whose hidden states are on disk already.

        Raises:
            BadInputError: a token id that the embedding does not have.
        """
        rows = self.source.info(self.structure.embed_disk_name).shape[0]
        for index, batch in enumerate(batches):
            low, high = int(batch.token_ids.min()), int(batch.token_ids.max())
            if low < 0 or high >= rows:
                raise BadInputError(
                    f"token id {low if low < 0 else high} in batch {index} is outside the "
                    f"embedding's {rows} rows",
                    "take the tokenizer that belongs to the checkpoint",
                )
        self.batches = tuple(batches)

    @contextmanager
    def materialise(self, block: int) -> Iterator[nn.Module]:
        """A block with its weights, on the device; they are released when the context ends.

        The weights are copies: a solver may change them in place.
        """
        structure = self.structure
        config = structure.skeleton.config
        module = copy.deepcopy(structure.block(block), {id(config): config})
        initialise_buffers(module, structure.skeleton, self.device)
        load_parameters(module, structure.block_prefix(block), self._read)
        try:
            yield module
        finally:
            module.to("meta")  # whoever still holds the module holds no memory

    @torch.no_grad()
    def forward(self, block: int, module: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """Run a block.

        Args:
            block: its index.
            module: the block itself, from `materialise`.
            batch: index of the batch that `hidden` belongs to.
            hidden: (batch, tokens, hidden), moved to the device.

        Returns:
            (batch, tokens, hidden) on the device.
        """
        return self.forward_batch(block, module, self.batches[batch], hidden)

    @torch.no_grad()
    def forward_batch(
        self, block: int, module: nn.Module, batch: TokenBatch, hidden: Tensor
    ) -> Tensor:
        """The same for a batch that is not on the walk, for example a few tokens of one that is.

        The call's masks and rotary embeddings follow the element type of `hidden`, so that a
        module that was widened can be run.
        """
        call = self._calls_of(batch)[block]
        if hidden.dtype != self.dtype:
            call = call.to(self.device, hidden.dtype)
        output = module(hidden.to(self.device), *call.args, **call.kwargs)
        assert isinstance(output, Tensor)
        return output

    def head(self) -> Head:
        """The way from the last block's outputs to logits."""
        structure = self.structure
        name = structure.anatomy.final_norm
        config = structure.skeleton.config
        norm = copy.deepcopy(structure.skeleton.get_submodule(name), {id(config): config})
        initialise_buffers(norm, structure.skeleton, self.device)
        load_parameters(norm, name, self._read)
        bias_name = f"{structure.anatomy.head}.bias"
        weight = structure.embed_disk_name if structure.tied_head else structure.head_disk_name
        assert weight is not None
        return Head(
            structure,
            norm,
            weight=lambda: self.source.read(weight),
            bias=self._read(bias_name).float() if bias_name in structure.disk_names else None,
            device=self.device,
        )

    def _calls_of(self, batch: TokenBatch) -> tuple[BlockCall, ...]:
        if not batch.has_default_call:
            return self._shell.run(batch).calls  # masks of many batches would not fit in memory
        calls = self._calls.pop(batch.shape, None)
        if calls is None:
            calls = self._shell.run(batch).calls
        self._calls[batch.shape] = calls
        if len(self._calls) > _REMEMBERED_SHAPES:
            self._calls.popitem(last=False)
        return calls

    def _read(self, memory_name: str) -> Tensor:
        tensor = self.source.read(self.structure.disk_name(memory_name))
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype, copy=True)

    def _read_rows(self, token_ids: Tensor) -> Tensor:
        table = self.source.read(self.structure.embed_disk_name)
        return table[token_ids.to(table.device)].to(self.device, self.dtype)


def calibration_walker(
    structure: ModelStructure, source: TensorSource, device: torch.device | str
) -> BlockWalker:
    """A walker for gathering statistics: in bfloat16 on processors that multiply it as such.

    Only for checkpoints in bfloat16, whose weights it holds exactly and which are served in it.
    Judging takes a plain :class:`BlockWalker`.
    """
    stored = source.info(structure.embed_disk_name).dtype
    narrow = (
        torch.device(device).type == "cpu" and stored == torch.bfloat16 and _has_bf16_products()
    )
    return BlockWalker(structure, source, device, torch.bfloat16 if narrow else None)


def _has_bf16_products() -> bool:
    # Without these instructions torch's bfloat16 products are slower than those of float32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
