"""Opens model directories with transformers and says what they answer.

Run as ``python open_with_transformers.py REQUEST.json RESPONSE.json [--dequantize]`` in any
environment that has transformers; the session's own process imports :func:`examine` for its
references. The fields of a request and a response are those of ``tests/interop/protocol.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig


def examine(job: dict[str, Any], dequantize: bool = False) -> dict[str, Any]:
    """Log-probability of each prompt token but the first, then greedy tokens with top-2 gaps.

    With ``dequantize`` a quantized checkpoint is opened as its user can ask transformers to.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, job["dtype"])}
    config = AutoConfig.from_pretrained(job["directory"])
    if dequantize and hasattr(config, "quantization_config"):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(job["directory"], **options).eval()
    answers = [_answer(model, prompt, job["num_tokens"]) for prompt in job["prompts"]]
    log_probs, tokens, gaps = zip(*answers, strict=True)
    return {"log_probs": log_probs, "tokens": tokens, "gaps": gaps}


@torch.inference_mode()
def _answer(
    model: Any, prompt: list[int], num_tokens: int
) -> tuple[list[float], list[int], list[float]]:
    out = model(torch.tensor([prompt]), use_cache=True)
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
        out = model(step, past_key_values=out.past_key_values, use_cache=True)


def main(request: str, response: str, *options: str) -> None:
    """Answer every job; one that the consumer refuses is answered with its error."""
    answers = []
    for job in json.loads(Path(request).read_text("utf-8"))["jobs"]:
        try:
            answers.append(examine(job, "--dequantize" in options))
        except Exception as error:  # whatever it raises is its answer
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(response).write_text(json.dumps({"jobs": answers}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
