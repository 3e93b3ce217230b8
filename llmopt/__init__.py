"""llmopt: turn a Hugging Face checkpoint into a smaller one, and prove that it is still good."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmopt import decoding as decoding
    from llmopt.errors import LlmoptError as LlmoptError
    from llmopt.evaluation import evaluate as evaluate
    from llmopt.loading import load as load
    from llmopt.pipeline import Result as Result
    from llmopt.pipeline import quantize as quantize
    from llmopt.recipe import Recipe as Recipe

_HOMES = {
    "LlmoptError": "llmopt.errors",
    "Recipe": "llmopt.recipe",
    "Result": "llmopt.pipeline",
    "evaluate": "llmopt.evaluation",
    "load": "llmopt.loading",
    "quantize": "llmopt.pipeline",
}

__all__ = ["LlmoptError", "Recipe", "Result", "__version__", "evaluate", "load", "quantize"]


def __getattr__(name: str) -> object:
    """Import the public names on first use, so that ``import llmopt`` costs nothing."""
    if name == "decoding":
        return importlib.import_module("llmopt.decoding")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
