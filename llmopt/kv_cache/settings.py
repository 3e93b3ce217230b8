"""What a cache of keys and values is to be: its kind, its pages, its window in 16 bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

KVKind = Literal["bf16", "fp8", "int8", "int4"]
"""``bf16`` stands for the model's own element type."""

KV_KINDS: tuple[KVKind, ...] = get_args(KVKind)
PAGE_SIZES = (16, 32, 64, 128)
"""Tokens a page that the kernels take; of int4 a page shares the scales of its keys."""


@dataclass(frozen=True, slots=True)
class KVCacheSettings:
    """A cache as a recipe asks for it and an artifact records it.

    Attributes:
        kind: the element type; see ``llmopt_kernels.paged_kv``.
        recent_window: of int4: a query reads at least this many latest positions in 16 bit.
        page_size: tokens a page.
    """

    kind: KVKind
    recent_window: int = 128
    page_size: int = 64

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values come back other than they were given."""
        return self.kind != "bf16"

    @property
    def has_static_scales(self) -> bool:
        """Whether scales are calibrated and stored with the weights."""
        return self.kind == "fp8"

    @property
    def first_quantized(self) -> int:
        """The first position whose query reads codes: of int4 a page fills before the window."""
        return self.recent_window + self.page_size - 1 if self.kind == "int4" else 0

    @property
    def label(self) -> str:
        """In a few words: ``fp8``, ``int4, pages of 64, the last 128 in 16 bit``."""
        if self.kind != "int4":
            return self.kind
        return f"int4, pages of {self.page_size}, the last {self.recent_window} in 16 bit"
