"""What a row is drawn from, in float64, straight from the definitions and token by token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmopt.decoding.sampling.parameters import SamplingParameters


def reference_distribution(
    logits: NDArray[np.float32], parameters: SamplingParameters, token_ids: list[int]
) -> NDArray[np.float64]:
    """``(vocabulary,) float64``, summing to 1."""
    scores = logits.astype(np.float64)
    for token in set(token_ids):
        penalty = parameters.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    if parameters.temperature == 0:
        return np.eye(len(scores))[int(scores.argmax())]
    # Tokens that are equally probable in float32 are so here: ties stay or go together.
    scores = scores.astype(np.float32).astype(np.float64)
    weights = np.exp((scores - scores.max()) / parameters.temperature)
    if parameters.top_k is not None:
        heavier = np.array([(weights > weight).sum() for weight in weights])
        weights = np.where(heavier < parameters.top_k, weights, 0)
    if parameters.top_p < 1:
        share = parameters.top_p * weights.sum()
        held = np.array([weights[weights > weight].sum() for weight in weights])
        weights = np.where(held < share, weights, 0)
    weights = np.where(weights >= parameters.min_p, weights, 0)
    return weights / weights.sum()
