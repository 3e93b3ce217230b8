"""llmopt's own engine, stepped here, so that every token's time is seen."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

PACKAGES = ("llmopt", "transformers")
Answer = tuple[list[list[int]], list[list[float]]]
_KINDS = {"16-bit": "bf16"}


def open_engine(request: dict[str, Any]) -> Llmopt:
    """An engine with room for all sequences at the longest context."""
    return Llmopt(request)


class Llmopt:
    """A running engine."""

    def __init__(self, request: dict[str, Any]) -> None:
        engine: Any = import_module("llmopt.decoding").Engine
        self._engine = engine(
            request["model"],
            kv_cache=_KINDS.get(request["kv"], request["kv"]),
            max_context=request["max_context"],
            max_sequences=request["max_sequences"],
            dtype=getattr(torch, request["dtype"]),
            device=request["device"],
        )
        self.notes: list[str] = []

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Answer:
        """See ``decode_session``."""
        raise NotImplementedError
