"""What may be drawn, and how probable it is: pure functions over a batch of rows.

Every filter is a threshold on a token's own weight, so that equal logits (16-bit logits often are)
stay or go together, whatever the order in which they are looked at:

* top-k keeps a token if fewer than k are strictly heavier;
* top-p keeps it if the strictly heavier hold less than p of the weight (arXiv:1904.09751);
* min-p keeps it if it weighs at least min-p times the heaviest (arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST_LOOK = 64
"""Heaviest tokens looked at for top-p; rows whose share is not reached look at sixteen times as
many, and so on: a full sort of a large vocabulary costs more than a small model's step."""


def penalise_repetition(logits: Tensor, token_ids: Sequence[int], penalty: float) -> None:
    """Divide positive and multiply negative logits of ``token_ids`` by ``penalty``, in place.

    Args:
        logits: ``(vocabulary,)`` floating point.
        token_ids: what was seen; one that occurs twice is penalised once (arXiv:1909.05858, as
            transformers computes it).
        penalty: 1 changes nothing.
    """
    seen = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)


def weigh(logits: Tensor, temperature: Tensor) -> Tensor:
    """Weights ``exp((logits - largest) / temperature)``: the heaviest token's is 1.

    Args:
        logits: ``(rows, vocabulary) float32``.
        temperature: ``(rows,) float32``, above 0.

    Returns:
        ``(rows, vocabulary) float32``, unnormalised probabilities.
    """
    weights = logits - logits.amax(dim=-1, keepdim=True)
    return weights.div_(temperature[:, None]).exp_()


def restrict(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to zero, in place, the weight of every token that a filter takes out.

    Top-p takes its share of what top-k left; min-p follows.

    Args:
        weights: ``(rows, vocabulary) float32`` of :func:`weigh`.
        top_k: ``(rows,) int64``; the size of the vocabulary keeps all.
        top_p: ``(rows,) float64`` in (0, 1].
        min_p: ``(rows,) float32`` in [0, 1].

    Returns:
        ``weights``.
    """
    vocabulary = weights.shape[1]
    (limited,) = torch.nonzero(top_k < vocabulary, as_tuple=True)
    if len(limited):
        ranks = top_k[limited]
        heaviest = weights[limited].topk(int(ranks.max())).values
        lightest = torch.zeros_like(min_p)
        lightest[limited] = heaviest.gather(1, ranks[:, None] - 1)[:, 0]
        weights.masked_fill_(weights < lightest[:, None], 0)
    lightest = torch.maximum(_nucleus_thresholds(weights, top_p), min_p)
    return weights.masked_fill_(weights < lightest[:, None], 0)


def _nucleus_thresholds(weights: Tensor, top_p: Tensor) -> Tensor:
    """The lightest weight in each row's nucleus: ``(rows,) float32``, 0 where top-p keeps all."""
    thresholds = weights.new_zeros(len(weights))
    (open_rows,) = torch.nonzero(top_p < 1, as_tuple=True)
    shares = top_p[open_rows] * weights[open_rows].sum(dim=-1, dtype=torch.float64)
    looked_at = _FIRST_LOOK
    while len(open_rows):
        looked_at = min(looked_at, weights.shape[1])
        heaviest = weights[open_rows].topk(looked_at).values
        held = heaviest.cumsum(dim=-1, dtype=torch.float64)
        reached = held[:, -1] >= shares
        if looked_at == weights.shape[1]:
            reached[:] = True  # p of 1 - 1e-17 can lie above the rounded sum of all
        last = torch.searchsorted(held, shares[:, None]).clamp_(max=looked_at - 1)
        thresholds[open_rows[reached]] = heaviest.gather(1, last)[reached, 0]
        open_rows, shares = open_rows[~reached], shares[~reached]
        looked_at *= 16
    return thresholds
