"""Opens model directories with vLLM and says what they answer.

Run as ``python open_with_vllm.py REQUEST.json RESPONSE.json`` in an environment that has vLLM. The
fields of a request and a response are those of ``tests/interop/protocol.py``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

# Read when vllm is imported. On a CPU with AMX, int4 weights would silently meet int8 activations.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_INT4_W4A8="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probability of each prompt token but the first, then greedy tokens with top-2 gaps."""
    llm = LLM(
        model=job["directory"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=8,
        enable_prefix_caching=False,
        seed=0,
    )
    try:
        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=job["num_tokens"],
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=1,
            logprobs=2,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        answers = [
            _answer(output, prompt)
            for output, prompt in zip(
                llm.generate(prompts, greedy, use_tqdm=False), job["prompts"], strict=True
            )
        ]
    finally:
        del llm
    log_probs, tokens, gaps = zip(*answers, strict=True)
    return {"log_probs": log_probs, "tokens": tokens, "gaps": gaps}


def _answer(output: Any, prompt: list[int]) -> tuple[list[float], list[int], list[float]]:
    told = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    log_probs = [row[token].logprob for token, row in told]
    completion = output.outputs[0]
    best = [
        sorted((entry.logprob for entry in row.values()), reverse=True)
        for row in completion.logprobs
    ]
    return log_probs, list(completion.token_ids), [row[0] - row[1] for row in best]


def main(request: str, response: str) -> None:
    """Answer every job; one that the consumer refuses is answered with its error."""
    answers = []
    for job in json.loads(Path(request).read_text("utf-8"))["jobs"]:
        try:
            answers.append(examine(job))
        except Exception as error:  # whatever it raises is its answer
            answers.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(response).write_text(json.dumps({"jobs": answers}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
