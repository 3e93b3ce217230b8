"""What a cache must know of a model's attention layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer, as its own forward shows it.

    Attributes:
        index: its ``layer_idx``.
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_dim: channels a head.
        window: positions that a query sees, its own included; None sees all.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
