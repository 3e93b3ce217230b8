"""The cache that a checkpoint on disk was judged with, as the engine's default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.decoding.kv_cache_config import HeadScales, KVCacheConfig, kv_cache_config
from llmopt.formats.dequantized import DequantizedSource
from llmopt.formats.kv_cache import read_cache, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_cache(choice: str | KVCacheConfig, model: str | Path | PreTrainedModel) -> KVCacheConfig:
    """The user's choice, completed by what the checkpoint says.

    ``auto`` takes the cache that the checkpoint was judged with, if there is one; ``fp8`` by name
    takes its scales. A config, any other name and a loaded model are taken as they are.

    Raises:
        BadInputError: a name that is not known, a checkpoint whose cache cannot be read.
    """
    config = kv_cache_config(choice)
    if isinstance(choice, KVCacheConfig) or not isinstance(model, str | Path):
        return config
    path = Path(model)
    if config.kind not in ("auto", "fp8") or not path.is_dir():
        return config
    stored = stored_cache(path)
    if stored is None or config.kind not in ("auto", stored.kind):
        return config
    return stored


def stored_cache(directory: Path) -> KVCacheConfig | None:
    """What the checkpoint says; ``None`` for a 16-bit cache.

    Raises:
        BadInputError: a checkpoint whose cache cannot be read, scales that are missing.
    """
    reader = open_checkpoint(directory)
    settings = read_settings(reader.config)
    if settings is None:
        return None
    config = KVCacheConfig(settings.kind, settings.page_size, settings.recent_window)
    if not settings.has_static_scales:
        return config
    structure = read_structure(DequantizedSource(reader))  # its scheme stands among the weights'
    cache = read_cache(reader.config, reader, structure)
    assert cache is not None
    heads = structure.text_config.num_key_value_heads
    scales = {
        layer: HeadScales((found.k,) * heads, (found.v,) * heads)
        for layer, found in enumerate(cache.scales)
    }
    return replace(config, fp8_scales=scales)
