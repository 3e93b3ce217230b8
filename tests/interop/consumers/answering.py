"""How a consumer whose models are torch modules answers.

The fields of a request and a response are those of ``tests/interop/protocol.py``. Imported by the
scripts beside it in their own environments, and by the tests.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def answer(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Log-probability of each prompt token but the first, then greedy tokens with top-2 gaps."""
    model.eval()
    answers = [_answer(model, prompt, job["num_tokens"]) for prompt in job["prompts"]]
    log_probs, tokens, gaps = zip(*answers, strict=True)
    return {"log_probs": log_probs, "tokens": tokens, "gaps": gaps}


@torch.inference_mode()
def _answer(
    model: Any, prompt: list[int], num_tokens: int
) -> tuple[list[float], list[int], list[float]]:
    out = model(input_ids=torch.tensor([prompt]), use_cache=True)
    log_probs = out.logits[0].float().log_softmax(-1)
    actual = log_probs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    tokens: list[int] = []
    gaps: list[float] = []
    while True:
        top = out.logits[0, -1].float().topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        if len(tokens) == num_tokens:
            return actual.tolist(), tokens, gaps
        step = torch.tensor([tokens[-1:]])
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)


def is_quantized(directory: str) -> bool:
    """Whether a model directory says that its weights are packed."""
    return "quantization_config" in json.loads(Path(directory, "config.json").read_text("utf-8"))


def serve(examine: Callable[[dict[str, Any]], dict[str, Any]], request: str, response: str) -> None:
    """Answer every job of ``request``; one that the consumer refuses is answered with its error."""
    answers = []
    for job in json.loads(Path(request).read_text("utf-8"))["jobs"]:
        try:
            answers.append(examine(job))
        except Exception as error:  # whatever it raises is its answer
            traceback.print_exc()
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(response).write_text(json.dumps({"jobs": answers}), "utf-8")
