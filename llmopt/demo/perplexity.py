"""Token losses of a model, for watching the training and for the model card."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel


def stream_blocks(stream: torch.Tensor, length: int, rows: int) -> Iterator[torch.Tensor]:
    """Yield ``[<= rows, length]`` consecutive blocks of a ``[tokens]`` stream; the rest is left."""
    blocks = stream[: len(stream) // length * length].view(-1, length)
    for first in range(0, len(blocks), rows):
        yield blocks[first : first + rows]


@torch.inference_mode()
def token_losses(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Return ``[rows, length - 1] float32`` negative log-likelihoods in nats."""
    logits = model(input_ids=blocks, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none"
    )
    return losses.view(blocks.shape[0], -1)


def stream_losses(model: PreTrainedModel, stream: torch.Tensor, length: int) -> torch.Tensor:
    """Return ``[blocks, length - 1]`` losses over a stream cut into blocks of ``length``."""
    rows = max(1, 8192 // length)
    return torch.cat([token_losses(model, b) for b in stream_blocks(stream, length, rows)])


def perplexity(losses: torch.Tensor) -> float:
    """Return ``exp(mean loss)``, all tokens weighted alike."""
    return float(losses.double().mean().exp())
