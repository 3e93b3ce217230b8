"""What the user chooses about the cache of keys and values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from llmopt.errors import BadInputError

if TYPE_CHECKING:
    import torch

KVKind = Literal["auto", "bf16", "fp16", "fp32", "fp8", "int8", "int4"]
KV_KINDS: tuple[KVKind, ...] = get_args(KVKind)
PAGE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class HeadScales:
    """Static fp8 scales of one layer: ``value = code * scale[head]``.

    Attributes:
        k: one positive number a KV head.
        v: likewise.
    """

    k: tuple[float, ...]
    v: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """How keys and values are kept.

    Attributes:
        kind: ``auto`` is the model's element type; ``bf16``, ``fp16`` and ``fp32`` name one.
            ``fp8``: e4m3 with a static scale a layer and head. ``int8``: symmetric, one scale a
            token and head, found at the write; whatever is read was quantized, a query's own token
            too. ``int4``: KIVI (arXiv:2402.02750), keys by channel over a page, values by token.
        page_size: tokens a page; of int4 also the group that shares a key channel's scale.
        recent_window: of int4, the latest tokens that are read in the model's element type. The
            query at position ``p`` reads those before ``boundary(p)`` from int4 and no others:
            a matter of ``p`` alone, however the prompt was cut into chunks.
        fp8_scales: by layer index; a layer without is scaled by 1.
    """

    kind: KVKind = "auto"
    page_size: int = 64
    recent_window: int = 128
    fp8_scales: Mapping[int, HeadScales] | None = None

    def __post_init__(self) -> None:
        """Refuse what no cache can be made of."""
        if self.kind not in KV_KINDS:
            close = difflib.get_close_matches(str(self.kind), KV_KINDS, n=1)
            raise BadInputError(
                f"kv_cache {self.kind!r} is not known",
                f"use {close[0]!r}" if close else f"use one of {', '.join(KV_KINDS)}",
            )
        if self.page_size not in PAGE_SIZES:
            raise BadInputError(
                f"page_size is {self.page_size}", f"use one of {', '.join(map(str, PAGE_SIZES))}"
            )
        if self.recent_window < 1:
            raise BadInputError(
                f"recent_window is {self.recent_window}", "give 1 or more: a token reads itself"
            )
        if self.fp8_scales is not None and self.kind != "fp8":
            raise BadInputError(
                f"fp8_scales are given for a cache of kind {self.kind!r}",
                "leave them out, or choose kind 'fp8'",
            )

    def boundary(self, position: int) -> int:
        """The first position that the query at ``position`` reads in 16 bit, of int4."""
        return int4_boundary(position, self.recent_window, self.page_size)

    def storage_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The element type of the 16-bit pages beside a model of ``model_dtype``."""
        import torch

        named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return named.get(self.kind, model_dtype)


def int4_boundary(position: int, recent_window: int, page_size: int) -> int:
    """``floor(max(0, position + 1 - recent_window) / page_size) * page_size``."""
    return max(0, position + 1 - recent_window) // page_size * page_size


def kv_cache_config(choice: str | KVCacheConfig) -> KVCacheConfig:
    """The config that a name stands for; a config is given back as it is.

    Raises:
        BadInputError: a name that is not known; says the closest.
    """
    return choice if isinstance(choice, KVCacheConfig) else KVCacheConfig(kind=choice)  # type: ignore[arg-type]
