"""Greedy text from a published artifact, through its packed linear layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch


def continue_text(directory: Path, prompt: str, num_tokens: int = 48) -> str:
    """``prompt`` and up to ``num_tokens`` greedy tokens by the model in ``directory``."""
    import torch

    from llmopt.calibration.tokenizer import load_tokenizer
    from llmopt.loading import load

    tokenizer = load_tokenizer(directory).tokenizer
    model = load(directory)
    prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    # GenerationMixin says so itself: its `generate` is typed, what it is mixed into is not.
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    generated = generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))
