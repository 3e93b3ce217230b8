"""The embedded decode engine: small, exact, measured; production serving is vLLM's and llama.cpp's.

One step is schedule → run → sample. The folders and files in the order of the data:

- ``sequence``: what a user asked for, and how far its answer has come;
- ``paging``: which page of the cache holds which tokens of which sequence (no torch);
- ``scheduler``: which tokens of which sequences the next step computes (no torch);
- ``kv``, ``attention``, ``runner``: one forward over them;
- ``sampling``, ``text``, ``engine``: the next tokens, and the text that they say.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmopt.decoding.completion import Completion as Completion
    from llmopt.decoding.completion import Delta as Delta
    from llmopt.decoding.engine import Engine as Engine
    from llmopt.decoding.kv_cache_config import KVCacheConfig as KVCacheConfig
    from llmopt.decoding.sampling.parameters import SamplingParameters as SamplingParameters

_HOMES = {
    "Completion": "llmopt.decoding.completion",
    "Delta": "llmopt.decoding.completion",
    "Engine": "llmopt.decoding.engine",
    "KVCacheConfig": "llmopt.decoding.kv_cache_config",
    "SamplingParameters": "llmopt.decoding.sampling.parameters",
}

__all__ = ["Completion", "Delta", "Engine", "KVCacheConfig", "SamplingParameters"]


def __getattr__(name: str) -> object:
    """Import the public names on first use: pages and steps are decided without torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmopt.decoding' has no attribute {name!r}")
