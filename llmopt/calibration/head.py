"""From the last block's output to logits, the vocabulary taken in chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmopt.checkpoint.materialise import shallow_copy
from llmopt.checkpoint.structure import ModelStructure

_CHUNK_BYTES = 32 * 2**20


class Head:
    """Final norm, head, and what the model's own forward does to logits (soft cap, scaling).

    Args:
        structure: the model's.
        norm: the final norm with its weights.
        weight: (vocabulary, hidden), memory-mapped; one chunk of it is in memory at a time.
        bias: (vocabulary,) or None.
        device: where to compute.
    """

    def __init__(
        self,
        structure: ModelStructure,
        norm: nn.Module,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        device: torch.device,
    ) -> None:
        self._norm = norm
        self._device = device
        self._body = _FinishedBody()
        self._model = shallow_copy(structure.skeleton)
        self._model._modules[structure.skeleton.base_model_prefix] = self._body
        self._model._modules[structure.anatomy.head] = _ChunkedLinear(weight, bias)

    @torch.no_grad()
    def inputs(self, hidden: Tensor) -> Tensor:
        """What enters the head.

        Args:
            hidden: (n, hidden) outputs of the last block, in the compute dtype.

        Returns:
            (n, hidden) float32 on the device, behind the final norm.
        """
        normed: Tensor = self._norm(hidden.to(self._device)[None])
        return normed[0].float()

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of tokens.

        Args:
            hidden: (n, hidden) outputs of the last block, in the compute dtype.

        Returns:
            (n, vocabulary) float32 on the device; the product itself is float32 too.
        """
        self._body.output = self.inputs(hidden)[None]
        logits = self._model(use_cache=False).logits[0]
        self._body.output = None
        assert isinstance(logits, Tensor) and logits.dtype == torch.float32
        return logits


class _FinishedBody(nn.Module):
    """In the body's place: has the body's output already."""

    output: Tensor | None = None

    def forward(self, **_: object) -> object:
        # A mixture's; a dense model does not ask for what it has more.
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.output)


class _ChunkedLinear(nn.Module):
    def __init__(self, weight: Callable[[], Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.read_weight = weight
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.read_weight()
        vocabulary, width = weight.shape
        rows = hidden.reshape(-1, width)
        logits = torch.empty(len(rows), vocabulary, device=hidden.device)
        step = max(1, _CHUNK_BYTES // (4 * width))
        for start in range(0, vocabulary, step):
            chunk = weight[start : start + step].to(hidden.device, torch.float32)
            logits[:, start : start + step] = rows @ chunk.T
        if self.bias is not None:
            logits += self.bias
        return logits.reshape(*hidden.shape[:-1], vocabulary)
