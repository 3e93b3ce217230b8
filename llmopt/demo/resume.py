"""Checkpoints of the training, so that an interrupted run goes on where it was."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmopt.errors import BadInputError


def save_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    text_sha256: str,
    step: int,
) -> None:
    """Write weights, optimizer states and what they were trained on, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "text_sha256": text_sha256,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    text_sha256: str,
) -> int:
    """Load a checkpoint if there is one; return the number of steps already done.

    Raises:
        BadInputError: the checkpoint was trained on other text.
    """
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["text_sha256"] != text_sha256:
        raise BadInputError(
            f"{path} was trained on other text than this Python's",
            "remove it, or give another file with --checkpoint",
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
