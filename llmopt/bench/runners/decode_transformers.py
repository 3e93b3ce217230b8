"""transformers' own ways to decode, each a variant: ``generate`` and continuous batching.

- ``dynamic``, ``static``: ``generate`` with that cache; requests of unlike length are padded on the
  left, and go on until the longest is done.
- ``sequential``: ``generate`` with the dynamic cache, one request after the other.
- ``continuous``: the manager behind ``generate_batch``, which takes a length for each request.

Packed weights are opened by ``llmopt.load``: there is no other way to decode them on every device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

PACKAGES = ("transformers",)
Answer = tuple[list[list[int]], list[list[float]]]
_PAD = 0


def open_engine(request: dict[str, Any]) -> Any:
    """The model in the element type asked for, and the variant's way to run it."""
    dtype, device = getattr(torch, request["dtype"]), request["device"]
    if request["is_packed"]:
        from llmopt import load

        model = load(request["model"], dtype=dtype, device=device)
    else:
        model = AutoModelForCausalLM.from_pretrained(Path(request["model"]), dtype=dtype)
        model = model.to(device)
    model.train(False)
    kinds = {"sequential": Sequential, "continuous": Continuous}
    return kinds.get(request["variant"], Padded)(model, request)


class Padded:
    """``generate`` on all requests at once."""

    def __init__(self, model: Any, request: dict[str, Any]) -> None:
        self.model = model
        self.notes: list[str] = []
        cache = "static" if request["variant"] == "static" else None
        self._options = {"cache_implementation": cache, "pad_token_id": _PAD}

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Answer:
        """See ``decode_session``."""
        clock = Clock()
        rows = _generate(self.model, prompts, max(new_tokens), self._options, clock)
        limits = list(new_tokens)
        tokens = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
        return tokens, [clock.seconds[:limit] for limit in limits]

    def gaps(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """By how much the logit of the best token led before the next, at every token."""
        found = []
        for prompt, row in zip(prompts, tokens, strict=True):
            best = self._whole(prompt, row).topk(2, dim=-1).values
            found.append((best[:, 0] - best[:, 1]).tolist())
        return found

    def noise(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> float:
        """By how much another batch shape can move the lead of one token before another.

        Both logits of a lead move, each by at most the largest difference found between a whole
        forward of one sequence and the same tokens decoded one by one in a batch of two.
        """
        largest = 0.0
        for prompt, row in zip(prompts, tokens, strict=True):
            apart = self._whole(prompt, row) - self._stepwise(prompt, row)
            largest = max(largest, float(apart.abs().max()))
        return 2 * largest

    def _whole(self, prompt: Sequence[int], row: Sequence[int]) -> torch.Tensor:
        """``(tokens of the answer, vocabulary) float32``, in one forward."""
        ids = torch.tensor([[*prompt, *row]], device=self.model.device)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(ids).logits[0, len(prompt) - 1 : -1].float()
        return logits

    def _stepwise(self, prompt: Sequence[int], row: Sequence[int]) -> torch.Tensor:
        """The same, decoded beside a sequence of the same tokens."""
        logits, cache = [], None
        with torch.inference_mode():
            for part in (list(prompt), *([token] for token in row[:-1])):
                ids = torch.tensor([part, part], device=self.model.device)
                found = self.model(ids, past_key_values=cache, use_cache=True)
                cache = found.past_key_values
                logits.append(found.logits[0, -1].float())
        return torch.stack(logits)


class Sequential(Padded):
    """``generate`` on one request after the other."""

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Answer:
        """See ``decode_session``."""
        clock = Clock()
        tokens, times = [], []
        for prompt, limit in zip(prompts, new_tokens, strict=True):
            clock.seconds = []
            tokens += _generate(self.model, [prompt], limit, self._options, clock)
            times.append(clock.seconds)
        return tokens, times


class Continuous:
    """Continuous batching, sized by transformers itself for the requests at hand."""

    def __init__(self, model: Any, request: dict[str, Any]) -> None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self.model = model
        self.notes: list[str] = []
        # By default it takes 60 % of a machine's memory for its cache, and touches all of it.
        pages = request["max_sequences"] * (-(-request["max_context"] // 256) + 1)
        self._config = ContinuousBatchingConfig(
            num_blocks=pages,
            max_batch_tokens=max(request["max_sequences"], 512),
            allow_block_sharing=False,
        )

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Answer:
        """See ``decode_session``."""
        config = _greedy(eos_token_id=-1, pad_token_id=_PAD)
        with (
            torch.no_grad(),  # its thread would refuse what was made in inference mode
            self.model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=self._config, block=True
            ) as manager,
        ):
            started = time.perf_counter()
            names = [
                manager.add_request(list(prompt), max_new_tokens=limit, record_timestamps=True)
                for prompt, limit in zip(prompts, new_tokens, strict=True)
            ]
            done: dict[str, Any] = {}
            while len(done) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    done[result.request_id] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("continuous batching ended before the requests did")
        found = [done[name] for name in names]
        return (
            [list(result.generated_tokens) for result in found],
            [[stamp - started for stamp in result.timestamps] for result in found],
        )


class Clock(BaseStreamer):
    """Notes when each step's tokens are known; ``generate`` puts the prompt first."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: list[float] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate`` with ``(B, T)`` prompts, then ``(B,)`` at every step."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.seconds.append(time.perf_counter() - self.started)

    def end(self) -> None:
        """Called at the end; the next prompt may come."""
        self._is_prompt = True


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    options: dict[str, Any],
    clock: Clock,
) -> list[list[int]]:
    """New tokens of every prompt, ``limit`` each."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), _PAD, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=model.device)
        mask[row, width - len(prompt) :] = 1
    # Made anew: what the checkpoint asks for (sampling, an end token) is not asked here.
    config = _greedy(max_new_tokens=limit, eos_token_id=None, **options)
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=mask, generation_config=config, streamer=clock)
    rows: list[list[int]] = found[:, width:].tolist()
    return rows


def _greedy(**options: Any) -> GenerationConfig:
    make: Any = GenerationConfig
    config: GenerationConfig = make(do_sample=False, **options)
    return config
