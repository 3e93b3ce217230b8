"""llmopt's own engine, stepped here, so that every token's time is seen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

# As transformers is for its own runner: what the model is opened with counts as the interpreter's.
import transformers.modeling_utils
import transformers.models.auto.modeling_auto  # noqa: F401

from llmopt.decoding import Engine

PACKAGES = ("llmopt", "transformers")
Answer = tuple[list[list[int]], list[list[float]]]
_PLAIN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""By name: ``auto`` would take the cache that a checkpoint was judged with."""


def open_engine(request: dict[str, Any]) -> Llmopt:
    """An engine with room for all sequences at the longest context."""
    return Llmopt(request)


class Llmopt:
    """A running engine."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._engine = Engine(
            request["model"],
            kv_cache=_PLAIN[request["dtype"]] if request["kv"] == "16-bit" else request["kv"],
            max_context=request["max_context"],
            max_sequences=request["max_sequences"],
            dtype=request["dtype"],
            device=request["device"],
        )
        self.notes = list(self._engine.notes)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Answer:
        """See ``decode_session``."""
        started = time.perf_counter()
        places = {
            self._engine.submit(list(prompt), max_new_tokens=limit, ignore_eos=True): place
            for place, (prompt, limit) in enumerate(zip(prompts, new_tokens, strict=True))
        }
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        while self._engine.has_work:
            deltas = self._engine.step()
            now = time.perf_counter() - started
            for delta in deltas:
                place = places[delta.request_id]
                tokens[place] += delta.token_ids
                times[place] += [now] * len(delta.token_ids)
        return tokens, times
