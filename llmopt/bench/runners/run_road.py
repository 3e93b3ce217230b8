"""The whole road in a process of its own, gate included: seconds by stage, memory by step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the road imports on its way counts as the interpreter's own memory.
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

from llmopt import pipeline
from llmopt.bench.runners.session import memory_bytes
from llmopt.recipe import load_recipe

PACKAGES = ("llmopt", "transformers")
_SAMPLING_S = 0.01


class StepPeaks:
    """Highest anonymous memory while each step of the road ran, as its progress names them."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._step = "prepare"
        self._over = threading.Event()

    def enter(self, step: str, _completed: int, _total: int) -> None:
        """A ``Progress``: what is used from now on is this step's."""
        self._step = step
        self._look()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look from a thread while the context lasts."""
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLING_S):
            self._look()

    def _look(self) -> None:
        step = self._step
        self.bytes[step] = max(self.bytes.get(step, 0), memory_bytes("RssAnon"))


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize, judge, publish; a refused output counts as a road that was gone to its end."""
    recipe = load_recipe(request["recipe"])
    size = {"num_samples": request["num_samples"], "sequence_length": request["length"]}
    calibration = recipe.calibration.model_copy(update=size)
    recipe = recipe.model_copy(update={"calibration": calibration})
    peaks = StepPeaks()
    started = time.monotonic()
    with peaks.watching():
        result = pipeline.quantize(
            Path(request["model"]), recipe, Path(request["output"]), progress=peaks.enter
        )
    seconds = time.monotonic() - started
    verdict = result.report.verdict
    found = ", ".join(
        f"{criterion.name} {criterion.estimate:.4g} (margin {criterion.margin:.4g})"
        for criterion in verdict.criteria
    )
    judged = (
        f"verdict {verdict.outcome} on {verdict.num_units} units, {verdict.num_tokens:,} tokens, "
        f"look {len(verdict.looks)} of {verdict.num_planned_looks}: {found}"
    )
    return {
        "quantize_s": seconds,
        "phases_s": dict(result.report.timings),
        "peaks_bytes": peaks.bytes,
        "notes": [judged],
    }
