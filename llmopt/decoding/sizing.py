"""How large the pools are where the user does not say."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from llmopt.decoding.attention.hook import find_layers
from llmopt.decoding.kv.layout import PoolLimits, group_page_bytes, page_groups, place_layers
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.limits import SchedulerOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE_OF_FREE_MEMORY = 0.25


def choose_limits(
    model: PreTrainedModel,
    config: KVCacheConfig,
    options: SchedulerOptions,
    num_pages: int | None,
    memory_bytes: int | None,
) -> PoolLimits:
    """The pools' limits: what the user gave, or else as much as can ever be used.

    That is the whole context for every sequence that may run, but no more than a quarter of the
    memory that is free on the model's device.

    Args:
        model: where the cache will lie.
        config: of the cache.
        options: how many sequences of what length may run.
        num_pages: given by the user.
        memory_bytes: given by the user.
    """

    def limits(num_pages: int | None, memory_bytes: int | None) -> PoolLimits:
        return PoolLimits(
            num_pages,
            memory_bytes,
            options.max_sequences,
            options.max_tokens_per_step,
            options.max_context,
        )

    if num_pages is not None or memory_bytes is not None:
        return limits(num_pages, memory_bytes)
    embedding: Any = model.get_input_embeddings()
    dtype = config.storage_dtype(embedding.weight.dtype)
    pages = options.max_sequences * -(-options.max_context // config.page_size)
    places = place_layers(find_layers(model), config)
    most = sum(
        group.num_pages * group_page_bytes(places, config, dtype, group.name)
        for group in page_groups(places, config, dtype, limits(pages, None))
    )
    allowed = int(SHARE_OF_FREE_MEMORY * free_memory_bytes(embedding.weight.device))
    return limits(pages, None) if most <= allowed else limits(None, allowed)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that are free on a device, those that the system would give back included."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
