"""One forward of a step: the tokens of all scheduled sequences, packed back to back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmopt.decoding.attention.cpu import CpuAttention
from llmopt.decoding.attention.hook import Attends, attending, configs_of, find_layers
from llmopt.decoding.attention.kernels import KernelAttention, plan_step
from llmopt.decoding.attention.reading import Scratch
from llmopt.decoding.decode_graph import DecodeGraphs, refusal
from llmopt.decoding.kv.layers import AttentionLayer
from llmopt.decoding.kv.layout import PoolLimits, page_groups, place_layers
from llmopt.decoding.kv.store import KVStore
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.paging.groups import PageGroup
from llmopt.decoding.scheduler import ScheduledStep
from llmopt.errors import BadInputError
from llmopt_kernels.launching import fp8_refusal
from llmopt_kernels.paged_kv import HEAD_DIMS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Backend = Literal["auto", "cpu", "kernels"]


class Runner:
    """Runs a model over the steps that the scheduler gives.

    The model is any transformers causal language model whose layers ask for their attention by
    name (``hook.py``), 16-bit, float32, or packed by ``llmopt.load``. Outside of ``run`` it is as
    it was, and may be used otherwise.

    Args:
        model: on one device; it is put into evaluation mode.
        config: of the cache.
        limits: how large the pools are.
        backend: of attention. ``cpu`` is torch's, ``kernels`` those of ``llmopt_kernels`` (16-bit
            models; on a CPU their torch references, slowly), ``auto`` goes by the device.
        capture: run decode steps of the kernels as CUDA graphs.

    Attributes:
        groups: the page groups, for the page manager.
        store: the pools.
        layers: the model's attention layers.
        graphs: decode steps as graphs; None without.
        capture_refusal: why this model's steps are not captured; None if they are, or were not
            asked to be.

    Raises:
        BadInputError: a model that cannot be served so, or limits that hold no page.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: KVCacheConfig,
        limits: PoolLimits,
        *,
        backend: Backend = "auto",
        capture: bool = True,
    ) -> None:
        self._model = model
        model.train(False)
        embedding: Any = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        dtype = config.storage_dtype(embedding.weight.dtype)
        self.layers = find_layers(model)
        places = place_layers(self.layers, config)
        self.groups: tuple[PageGroup, ...] = page_groups(places, config, dtype, limits)
        on_cpu = self._device.type == "cpu"
        self._by_kernels = backend == "kernels" or (backend == "auto" and not on_cpu)
        if self._by_kernels:
            _check_kernels(self.layers, config, embedding.weight)
        elif not on_cpu:
            raise BadInputError(
                f"backend 'cpu' for a model on {self._device}", "move the model, or say 'auto'"
            )
        self.store = KVStore(places, self.groups, config, dtype, self._device)
        self._configs = configs_of(model)
        self._scratch = Scratch()
        self.graphs: DecodeGraphs | None = None
        self.capture_refusal = refusal(model) if self._by_kernels and capture else None
        if self._by_kernels and capture and self.capture_refusal is None:
            pages = max(group.num_pages for group in self.groups)
            if limits.max_context is not None:
                pages = min(pages, -(-limits.max_context // config.page_size))
            self.graphs = DecodeGraphs(self._forward, self.store, pages, self._device)

    def run(self, step: ScheduledStep) -> Tensor:
        """Copy pages, write the step's tokens into the cache, and compute what is sampled.

        Returns:
            ``(rows, vocabulary) float32``: the logits after each chunk that ends with its
            sequence's last known token (``chunk.samples``), in the order of the chunks.
        """
        self.store.copy_pages(step.copies)
        chunks = step.chunks
        if self.graphs is not None and chunks and self.graphs.takes(chunks):
            logits = self.graphs.run(chunks)
            if not all(chunk.samples for chunk in chunks):
                logits = logits[[i for i, chunk in enumerate(chunks) if chunk.samples]]
        else:
            logits = self._run_eagerly(step)
        return logits.clone().float()

    def _run_eagerly(self, step: ScheduledStep) -> Tensor:
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in step.chunks:
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + chunk.num_tokens))
            if chunk.samples:
                rows.append(len(token_ids) - 1)
        attends: Attends
        if not self._by_kernels:
            attends = CpuAttention(self.store, step, self._scratch)
        else:
            plans = plan_step(step.chunks, self.store).items()
            attends = KernelAttention(self.store, {k: plan.to(self._device) for k, plan in plans})
        kept = self._row(rows)[0] if len(rows) < len(token_ids) else None
        return self._forward(attends, self._row(token_ids), self._row(positions), kept)

    def _forward(
        self, attends: Attends, token_ids: Tensor, positions: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        with torch.inference_mode(), attending(self._configs, attends):
            output = self._model(
                input_ids=token_ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=0 if kept is None else kept,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _row(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], dtype=torch.long, device=self._device)


def _check_kernels(
    layers: tuple[AttentionLayer, ...], config: KVCacheConfig, weight: Tensor
) -> None:
    """Refuse what ``llmopt_kernels`` does not take, before anything is allocated."""
    dtype = weight.dtype
    if dtype not in (torch.bfloat16, torch.float16) or config.storage_dtype(dtype) != dtype:
        raise BadInputError(
            f"the kernels take bfloat16 and float16 models over 16-bit pages of the same type; "
            f"this one is {dtype} over {config.storage_dtype(dtype)}",
            "load the model in bfloat16, with kv_cache 'auto', 'fp8', 'int8' or 'int4'",
        )
    dims = sorted({layer.head_dim for layer in layers} - set(HEAD_DIMS))
    if dims:
        raise BadInputError(
            f"heads of {dims[0]} channels; the kernels have {', '.join(map(str, HEAD_DIMS))}",
            "run this model on a CPU",
        )
    if config.kind == "fp8" and weight.device.type == "cuda":
        lacks = fp8_refusal(torch.cuda.get_device_capability(weight.device))
        if lacks:
            raise BadInputError(lacks, "choose kv_cache 'int8'")
