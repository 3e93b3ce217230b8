"""Where a checkpoint says what cache it is for: ``config.json``, and scales beside the weights.

An fp8 cache is compressed-tensors' ``kv_cache_scheme`` (8-bit floats, one static scale a tensor)
with ``<attention>.k_scale`` and ``<attention>.v_scale``, ``(1,)``, which transformers and vLLM look
up by these names; ``value = code * scale``. What no other consumer has (int8, int4, pages, window)
is under a key of our own in ``config.json``, which others carry along and do not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from llmopt.checkpoint.structure import ModelStructure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import BadInputError
from llmopt.kv_cache.reading import KVCache, LayerScales
from llmopt.kv_cache.settings import PAGE_SIZES, KVCacheSettings, KVKind

CONFIG_KEY = "llmopt_kv_cache"
SCHEMA_VERSION = 1
SCALE_PARTS = ("k_scale", "v_scale")
_SCHEME_KEY = "kv_cache_scheme"
_MEND = "mend config.json, or take the model from its maker again"


def cache_scheme() -> dict[str, JsonValue]:
    """An fp8 cache in the words of compressed-tensors (``QuantizationArgs``)."""
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
    }


def own_section(settings: KVCacheSettings) -> dict[str, JsonValue]:
    """The same, and all other caches, in words of our own."""
    section: dict[str, JsonValue] = {
        "schema_version": SCHEMA_VERSION,
        "kind": settings.kind,
        "page_size": settings.page_size,
    }
    if settings.kind == "int4":
        section["recent_window"] = settings.recent_window
    return section


def is_cache_scale(name: str) -> bool:
    """Whether a checkpoint's tensor is a scale of its cache."""
    return name.rpartition(".")[2] in SCALE_PARTS


def check_cache_scheme(section: Mapping[str, JsonValue]) -> None:
    """Refuse a ``kv_cache_scheme`` that is not an fp8 cache with one static scale a tensor.

    Raises:
        BadInputError: says what it is.
    """
    expected = cache_scheme()
    for key in ("num_bits", "type", "symmetric", "strategy", "dynamic"):
        found = section.get(key, expected[key] if key in ("symmetric", "dynamic") else None)
        if found != expected[key]:
            raise BadInputError(
                f"the compressed-tensors config quantizes the cache with {key} {found!r} "
                f"({_SCHEME_KEY})",
                f"llmopt reads fp8 caches with one static scale a tensor ({key} {expected[key]!r})",
            )


def read_settings(config: Mapping[str, JsonValue]) -> KVCacheSettings | None:
    """The cache that a checkpoint with this ``config.json`` is for; ``None`` for a 16-bit one.

    Raises:
        BadInputError: a section that cannot be read, or two that contradict each other.
    """
    own = config.get(CONFIG_KEY)
    quantization = config.get("quantization_config")
    scheme = quantization.get(_SCHEME_KEY) if isinstance(quantization, dict) else None
    if scheme is not None:
        if not isinstance(scheme, dict):
            raise BadInputError(f"{_SCHEME_KEY} is {scheme!r}", _MEND)
        check_cache_scheme(scheme)
    settings = KVCacheSettings("fp8") if own is None and scheme else None
    if own is not None:
        settings = _read_own(own)
        if (settings.kind == "fp8") != bool(scheme):
            raise BadInputError(
                f"{CONFIG_KEY} says {settings.kind} and {_SCHEME_KEY} says "
                f"{'fp8' if scheme else 'nothing'}",
                _MEND,
            )
    return settings


def _read_own(section: JsonValue) -> KVCacheSettings:
    if not isinstance(section, dict) or section.get("schema_version") != SCHEMA_VERSION:
        raise BadInputError(f"{CONFIG_KEY} is {section!r}, of no version that llmopt knows", _MEND)
    kind, page_size = section.get("kind"), section.get("page_size")
    window = section.get("recent_window", 128)
    known = kind in get_args(KVKind) and kind != "bf16" and page_size in PAGE_SIZES
    if not known or not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise BadInputError(f"{CONFIG_KEY} holds {section!r}, no cache that llmopt knows", _MEND)
    return KVCacheSettings(kind=kind, recent_window=window, page_size=page_size)  # type: ignore[arg-type]


def attention_names(structure: ModelStructure) -> list[str]:
    """The attention module of every block, by its name in the checkpoint."""
    return [_attention_name(structure, block) for block in range(structure.num_blocks)]


def _attention_name(structure: ModelStructure, block: int) -> str:
    found = [
        (path, child)
        for path, child in structure.block(block).named_modules()
        if path and hasattr(child, "layer_idx") and _linears(child)
    ]
    if not found:
        raise BadInputError(
            f"no attention was found in {structure.block_prefix(block)}",
            "leave kv_cache out of the recipe for this architecture",
        )
    path, module = found[0]
    memory = f"{structure.block_prefix(block)}.{path}.{_linears(module)[0]}"
    return structure.disk_module(memory).rpartition(".")[0]


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if isinstance(child, nn.Linear)]


def read_cache(
    config: Mapping[str, JsonValue], source: TensorSource, structure: ModelStructure
) -> KVCache | None:
    """The quantized cache that a checkpoint is for, its scales included.

    Args:
        config: the checkpoint's ``config.json``, quantization and all.
        source: its tensors as they lie on disk.
        structure: of the model.

    Raises:
        BadInputError: what cannot be read; a scale that is missing, no number or not positive.
    """
    settings = read_settings(config)
    if settings is None:
        return None
    if not settings.has_static_scales:
        return KVCache(settings)
    names = frozenset(source.names)
    scales = []
    for module in attention_names(structure):
        k, v = (_read_scale(f"{module}.{part}", source, names) for part in SCALE_PARTS)
        scales.append(LayerScales(k, v))
    return KVCache(settings, tuple(scales))


def _read_scale(name: str, source: TensorSource, names: frozenset[str]) -> float:
    if name not in names:
        raise BadInputError(
            f"{name} is missing: an fp8 cache has a scale a layer", "download the checkpoint again"
        )
    tensor = source.read(name)
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise BadInputError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not one number", _MEND
        )
    scale = float(tensor)
    if not 0 < scale < float("inf"):
        raise BadInputError(f"{name} is {scale}", "download the checkpoint again")
    return scale


def scale_tensor(largest: float, dtype: torch.dtype) -> Tensor:
    """``(1,)``: the scale that brings ``largest`` to the end of e4m3, rounded up to fit."""
    exact = largest / torch.finfo(torch.float8_e4m3fn).max or 1.0
    scale = torch.tensor([exact], dtype=torch.float64).to(dtype)
    if float(scale) < exact:
        scale = torch.nextafter(scale, torch.full_like(scale, float("inf")))
    return scale
