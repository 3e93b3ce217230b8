"""The model around its decoder blocks: recorders in the blocks' place, run for what they are told.

The model's own forward decides which mask, rotary embedding and positions each block is called
with; running it with recorders instead of blocks tells, and needs no block's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmopt.checkpoint.materialise import (
    ReadParameter,
    initialise_buffers,
    load_parameters,
    shallow_copy,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadRows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of one length that go through the model together.

    Attributes:
        token_ids: (batch, tokens) int64.
        position_ids: (batch, tokens) int64, or None for 0, 1, 2, ...
        attention_mask: (batch or 1, 1, tokens, tokens), boolean (True = may attend) or additive
            floating point, or None for the architecture's own causal mask. It replaces that mask
            in every block, sliding windows included, as transformers does with a 4-D mask.
        names: what each row is (a document), for error messages; may be empty.
    """

    token_ids: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.token_ids.ndim == 2 and self.token_ids.dtype == torch.int64
        assert self.attention_mask is None or self.attention_mask.ndim == 4
        assert len(self.names) in (0, len(self.token_ids))

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens)."""
        return (self.token_ids.shape[0], self.token_ids.shape[1])

    @property
    def has_default_call(self) -> bool:
        """Whether the shape alone decides what blocks are called with."""
        return self.position_ids is None and self.attention_mask is None

    def row_name(self, row: int) -> str:
        """The name of a row, or its index."""
        return self.names[row] if self.names else f"row {row}"


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What a decoder block is called with besides its hidden states."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BlockCall:
        """The same call, every tensor on `device`; those of floating point in `dtype` if given."""
        args = _moved(self.args, device, dtype)
        kwargs = _moved(self.kwargs, device, dtype)
        assert isinstance(args, tuple) and isinstance(kwargs, dict)
        return BlockCall(args, kwargs)


@dataclass(frozen=True, slots=True)
class BodyRecord:
    """One run of the shell: block 0's input (batch, tokens, hidden) and every block's call."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


def _moved(value: object, device: torch.device | str, dtype: torch.dtype | None) -> object:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    return value


class _Recorder(nn.Module):
    """Notes its call, hands its hidden states on, and answers for the block's attributes."""

    def __init__(self, block: nn.Module, calls: list[tuple[Tensor, BlockCall]]) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: the shell must not own the block
        self.calls = calls

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        assert isinstance(hidden, Tensor)
        self.calls.append((hidden, BlockCall(args[1:], kwargs)))
        return hidden.clone()  # a new tensor: who takes the last block's output is seen by identity

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            attribute: Tensor | nn.Module = getattr(self.__dict__["block"], name)
            return attribute


class _EmbeddedRows(nn.Module):
    """The model's own embedding module over only those rows of its table that are asked for."""

    def __init__(self, embedding: nn.Module, read_rows: ReadRows) -> None:
        super().__init__()
        self.embedding = embedding
        self.read_rows = read_rows

    def forward(self, token_ids: Tensor) -> Tensor:
        used, positions = torch.unique(token_ids, return_inverse=True)
        rows = self.read_rows(used)
        embedded = torch.func.functional_call(self.embedding, {"weight": rows}, (positions,))
        assert isinstance(embedded, Tensor)
        return embedded


class BodyShell:
    """A model's body (embedding ... final norm) with recorders for blocks and no norm at the end.

    Args:
        skeleton: the causal language model on the meta device.
        body_name: memory name of the module whose child list holds the blocks.
        blocks_name: memory name of that list.
        embedding_name: memory name of the token embedding.
        replaced: memory names of further children to pass through (the final norm).
        read_parameter: memory name -> tensor, for what else the body holds.
        read_rows: (n,) int64 token ids -> (n, hidden) rows in the compute dtype, on the device.
        device: where the records are wanted.
        dtype: of the rows, and so of additive masks.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        body_name: str,
        blocks_name: str,
        embedding_name: str,
        replaced: tuple[str, ...],
        read_parameter: ReadParameter,
        read_rows: ReadRows,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._adds_masks = skeleton.config._attn_implementation == "eager"
        self._list_name = blocks_name.rpartition(".")[2]
        self._calls: list[tuple[Tensor, BlockCall]] = []
        source = skeleton.get_submodule(body_name)
        blocks = skeleton.get_submodule(blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        memo = {id(skeleton.config): skeleton.config}
        self.body = shallow_copy(source)
        for child_name, child in source.named_children():
            name = f"{body_name}.{child_name}" if body_name else child_name
            substitute: nn.Module
            if name == blocks_name:
                substitute = nn.ModuleList(_Recorder(block, self._calls) for block in blocks)
            elif name == embedding_name:
                embedding = copy.deepcopy(child, memo)
                # The padding row has no meaning among the rows of one batch.
                embedding.padding_idx = None  # type: ignore[assignment]  # nn.Embedding's own type
                initialise_buffers(embedding, skeleton, device)
                substitute = _EmbeddedRows(embedding, read_rows)
            elif name in replaced:
                substitute = nn.Identity()
            else:
                substitute = copy.deepcopy(child, memo)
                initialise_buffers(substitute, skeleton, device)
                load_parameters(substitute, name, read_parameter)
            self.body._modules[child_name] = substitute

    @property
    def recorders(self) -> nn.ModuleList:
        """The recorders, in the blocks' order."""
        recorders = self.body._modules[self._list_name]
        assert isinstance(recorders, nn.ModuleList)
        return recorders

    @torch.no_grad()
    def run(self, batch: TokenBatch) -> BodyRecord:
        """Run the body once over `batch` and say what every block was called with."""
        self._calls.clear()
        position_ids = batch.position_ids
        self.body(
            input_ids=batch.token_ids.to(self._device),
            attention_mask=self._mask(batch.attention_mask),
            position_ids=None if position_ids is None else position_ids.to(self._device),
            use_cache=False,
        )
        recorded, self._calls[:] = list(self._calls), []
        return BodyRecord(recorded[0][0], tuple(call for _, call in recorded))

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """In the form that the attention takes: eager attention adds its mask, so never boolean."""
        if mask is None:
            return None
        mask = mask.to(self._device)
        if mask.dtype != torch.bool:
            return mask.to(self._dtype)
        if not self._adds_masks:
            return mask
        added = torch.zeros(mask.shape, dtype=self._dtype, device=mask.device)
        return added.masked_fill_(~mask, torch.finfo(self._dtype).min)
