"""llmopt itself, measured as its peers are: in a process of its own, on the same token ids.

What is timed as quantization is what the peers do in theirs: calibrate, solve, pack, write. The
contract and the source's hashes count for the wall time. No text is read, as the peers read none;
the gate is left to the benchmark's evaluator, which judges every quantizer alike.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch

# What the road imports on its way, here, so that it counts as the interpreter's own memory and not
# as the quantization's: the peers import it all at once.
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import llmopt.calibration.forwards
import llmopt.calibration.statistics
import llmopt.calibration.walker
import llmopt.compressing
import llmopt.targets.checkpoint
from llmopt.bench.stopwatch import Stopwatch
from llmopt.calibration.tokens import TokenBlocks, TokenCoverage
from llmopt.compressing import write_parts
from llmopt.job import prepare, stage_artifact
from llmopt.pipeline import finish
from llmopt.progress import silent
from llmopt.recipe import Recipe, load_recipe
from llmopt.texts import EvaluationText, Texts
from llmopt_evals.units import HeldOutText

PACKAGES = ("llmopt", "transformers")

# Where the phases are entered: an attribute that is gone fails the run, and its test.
PHASES: tuple[tuple[object, str, str], ...] = (
    (llmopt.calibration.walker.BlockWalker, "start", "calibration forwards"),
    (llmopt.calibration.forwards.BlockForwards, "collect", "calibration forwards"),
    (llmopt.calibration.forwards.BlockForwards, "collect_wave", "calibration forwards"),
    (llmopt.calibration.forwards.BlockForwards, "advance", "calibration forwards"),
    (llmopt.calibration.statistics.InputStatistics, "update", "Hessians"),
    (llmopt.targets.checkpoint, "scale_block", "scale search"),
    (llmopt.targets.checkpoint, "solve_block", "solve"),
    (llmopt.targets.checkpoint, "round_seen_block", "solve"),
    (llmopt.targets.checkpoint, "round_block", "solve"),
    (llmopt.targets.checkpoint, "assemble_part", "pack and write"),
    (llmopt.compressing, "_write_part", "pack and write"),
)


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize by the recipe in ``options``, up to the gate, and move the result into place."""
    stopwatch = Stopwatch()
    for owner, attribute, phase in PHASES:
        stopwatch.watch(owner, attribute, phase)
    output = Path(request["output"])
    recipe = sized(load_recipe(request["options"]["recipe"]), request["token_ids"])
    texts = given_texts(recipe, torch.tensor(request["token_ids"], dtype=torch.int64))
    job = prepare(Path(request["model"]), recipe, output, False, "cpu", silent, texts)
    with stage_artifact(job, output, resume=False) as artifact:
        started = time.monotonic()
        with stopwatch.phase("rest"):
            write_parts(job, artifact, silent)
            finish(job, artifact, silent)
        seconds = time.monotonic() - started
        os.replace(artifact.directory, output)
    return {"quantize_s": seconds, "phases_s": stopwatch.seconds}


def sized(recipe: Recipe, token_ids: list[list[int]]) -> Recipe:
    """The recipe with the benchmark's number and length of calibration blocks."""
    size = {"num_samples": len(token_ids), "sequence_length": len(token_ids[0])}
    calibration = recipe.calibration.model_copy(update=size)
    return recipe.model_copy(update={"calibration": calibration})


def given_texts(recipe: Recipe, token_ids: torch.Tensor) -> Texts:
    """Calibration blocks ``(samples, length) int64`` of the benchmark's choosing, nothing else.

    Plain rounding looks at no text, and gets none.
    """
    nothing = EvaluationText(HeldOutText((), 0, 0, 0, None), (), (), "", 0, ())
    if not recipe.calibrates:
        return Texts(None, "", nothing)
    coverage = TokenCoverage(0, 0, 0, token_ids.numel(), 0, 0, False)
    digest = hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()
    return Texts(TokenBlocks(token_ids, (), coverage), digest, nothing)
