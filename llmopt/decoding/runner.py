"""One forward of a step: the tokens of all scheduled sequences, packed back to back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmopt.decoding.attention.cpu import CpuAttention
from llmopt.decoding.attention.hook import attending, configs_of, find_layers
from llmopt.decoding.kv.layout import PoolLimits, page_groups, place_layers
from llmopt.decoding.kv.store import KVStore
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.paging.groups import PageGroup
from llmopt.decoding.scheduler import ScheduledStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runner:
    """Runs a model over the steps that the scheduler gives.

    The model is any transformers causal language model whose layers ask for their attention by
    name (``hook.py``), 16-bit, float32, or packed by ``llmopt.load``. Outside of ``run`` it is as
    it was, and may be used otherwise.

    Args:
        model: in evaluation mode, on one device.
        config: of the cache.
        limits: how large the pools are.

    Attributes:
        groups: the page groups, for the page manager.
        store: the pools.

    Raises:
        BadInputError: a model that cannot be served so, or limits that hold no page.
    """

    def __init__(self, model: PreTrainedModel, config: KVCacheConfig, limits: PoolLimits) -> None:
        self._model = model
        model.train(False)
        embedding: Any = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        dtype = config.storage_dtype(embedding.weight.dtype)
        places = place_layers(find_layers(model), config)
        self.groups: tuple[PageGroup, ...] = page_groups(places, config, dtype, limits)
        self.store = KVStore(places, self.groups, config, dtype, self._device)
        self._configs = configs_of(model)

    def run(self, step: ScheduledStep) -> Tensor:
        """Copy pages, write the step's tokens into the cache, and compute what is sampled.

        Returns:
            ``(rows, vocabulary) float32``: the logits after each chunk that ends with its
            sequence's last known token (``chunk.samples``), in the order of the chunks.
        """
        self.store.copy_pages(step.copies)
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in step.chunks:
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + chunk.num_tokens))
            if chunk.samples:
                rows.append(len(token_ids) - 1)
        with (
            torch.inference_mode(),
            attending(self._configs, CpuAttention(self.store, step)),
        ):
            output = self._model(
                input_ids=self._row(token_ids),
                position_ids=self._row(positions),
                use_cache=False,
                logits_to_keep=self._row(rows)[0],
            )
        logits: Tensor = output.logits[0]
        return logits.clone().float()

    def _row(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], dtype=torch.long, device=self._device)
