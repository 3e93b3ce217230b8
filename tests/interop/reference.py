"""What transformers answers in float32, in the tests' own process."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from interop.consumers.answering import answer
from interop.protocol import Answer, Job, read_answer


@cache
def reference(directory: Path, prompts: tuple[tuple[int, ...], ...], num_tokens: int) -> Answer:
    """The answer of a directory whose weights are not packed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    told = read_answer(answer(model, asdict(Job(str(directory), "float32", prompts, num_tokens))))
    assert isinstance(told, Answer)
    return told
