"""How far a candidate's next-token distribution lies from the reference's, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmopt_evals.errors import NotFiniteError
from llmopt_evals.scorer import Scores

# Logits are asked for in large pieces (a head read from disk is read once a piece) and compared
# in small ones that stay in the cache.
_ASKED_ELEMENTS = 1 << 25  # float32, 128 MiB a model
_MIN_ASKED_ROWS = 128
_COMPARED_ELEMENTS = 1 << 20  # float32, 4 MiB a buffer


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """What was measured at each predicted token of one block, each ``(T - 1,)``.

    Attributes:
        nll_reference: float32, nats.
        nll_candidate: float32, nats.
        kl: float32, KL(reference || candidate) in nats, never negative.
        agrees: bool, whether both models' most likely tokens are the same.
    """

    nll_reference: NDArray[np.float32]
    nll_candidate: NDArray[np.float32]
    kl: NDArray[np.float32]
    agrees: NDArray[np.bool_]


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) of each row, ``(n,) float32``, from ``(n, vocab) float32`` logits.

    With d = log p - log q, ``sum p d`` loses everything below 1e-7 to the rounding of the
    normalisers. ``sum p (d + exp(-d) - 1)`` is the same number (p and q sum to one), every term is
    non-negative, and an error of the normalisers enters squared: good to 1e-11 in float32.
    """
    scratch = _Scratch()
    norm, _, total = _normalise(reference, scratch.take(0, reference))
    p = scratch.take(0, reference).div_(total[:, None])
    other_norm, _, _ = _normalise(candidate, scratch.take(1, candidate))
    return _kl(reference, p, norm, candidate, other_norm, scratch)


class _Scratch:
    """Three reused buffers: fresh pages for each temporary would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0)] * 3

    def take(self, index: int, like: Tensor) -> Tensor:
        if (
            self._buffers[index].numel() < like.numel()
            or self._buffers[index].device != like.device
        ):
            self._buffers[index] = torch.empty(like.numel(), device=like.device)
        return self._buffers[index][: like.numel()].view(like.shape)


def _normalise(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log normaliser, largest logit, sum of exp(logit - largest), each ``(n,)``; exp in ``out``."""
    largest = logits.amax(-1)
    total = torch.sub(logits, largest[:, None], out=out).exp_().sum(-1)
    return largest + total.log(), largest, total


def _kl(
    reference: Tensor, p: Tensor, norm: Tensor, candidate: Tensor, other: Tensor, scratch: _Scratch
) -> Tensor:
    log_ratio = torch.sub(candidate, reference, out=scratch.take(1, reference))  # log q - log p
    log_ratio.sub_((other - norm)[:, None])
    terms = torch.expm1(log_ratio, out=scratch.take(2, reference))
    kl = terms.sub_(log_ratio).mul_(p).sum(-1)
    # exp overflows where q is above p by e**60: there the plain sum is exact enough.
    far = (log_ratio.amax(-1) > 60).nonzero().squeeze(-1)
    if len(far):
        kl[far] = -(p[far] * log_ratio[far]).sum(-1)
    return kl


@torch.inference_mode()
def measure_block(
    tokens: Tensor,
    sequence: int,
    reference: Scores,
    candidates: Sequence[Scores],
    names: Sequence[str],
    unit: str,
) -> list[Divergence]:
    """Each candidate against the reference on one block; logits live for one chunk only.

    Args:
        tokens: ``(T,) int64``, T >= 2.
        sequence: the block's index in every one of the scores.
        reference: the reference's scores.
        candidates: the scores compared with it.
        names: what to call the candidates in an error.
        unit: what to call the text in an error.

    Raises:
        NotFiniteError: NaN or infinite logits; names the model, the unit and the position.
    """
    parts: list[list[Divergence]] = [[] for _ in candidates]
    scratch = _Scratch()
    for start, stop, logits in _pieces(reference, sequence, len(tokens) - 1):
        targets = tokens[start + 1 : stop + 1, None].to(logits.device)
        others = [scores.logits(sequence, start, stop).to(logits.device) for scores in candidates]
        rows = max(1, _COMPARED_ELEMENTS // logits.shape[-1])
        for first in range(0, stop - start, rows):
            some = slice(first, first + rows)
            compared = _compare(
                targets[some],
                logits[some],
                [other[some] for other in others],
                names,
                (unit, start + first),
                scratch,
            )
            for part, divergence in zip(parts, compared, strict=True):
                part.append(divergence)
    return [_join(part) for part in parts]


def _pieces(scores: Scores, sequence: int, num_rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Pieces of the reference's logits; the vocabulary is learned from the first one."""
    start, step = 0, _MIN_ASKED_ROWS
    while start < num_rows:
        stop = min(start + step, num_rows)
        logits = scores.logits(sequence, start, stop)
        yield start, stop, logits
        step = max(_MIN_ASKED_ROWS, _ASKED_ELEMENTS // logits.shape[-1])
        start = stop


def _compare(
    targets: Tensor,
    logits: Tensor,
    others: Sequence[Tensor],
    names: Sequence[str],
    place: tuple[str, int],
    scratch: _Scratch,
) -> Iterator[Divergence]:
    """Each of the others against the reference's ``(n, vocab)`` logits; targets are ``(n, 1)``."""
    norm, _, total = _normalise(logits, scratch.take(0, logits))
    p = scratch.take(0, logits).div_(total[:, None])
    _check(norm, "reference", *place)
    nll = norm - logits.gather(1, targets).squeeze(1)
    top = logits.argmax(-1, keepdim=True)
    for other, name in zip(others, names, strict=True):
        other_norm, largest, _ = _normalise(other, scratch.take(1, other))
        _check(other_norm, name, *place)
        kl = _kl(logits, p, norm, other, other_norm, scratch).clamp_(min=0.0)
        _check(kl, f"reference's or the {name}", *place)
        other_nll = other_norm - other.gather(1, targets).squeeze(1)
        agrees = other.gather(1, top).squeeze(1) == largest
        yield Divergence(*(t.cpu().numpy() for t in (nll, other_nll, kl, agrees)))


def _check(values: Tensor, name: str, unit: str, start: int) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        position = start + int((~finite).nonzero()[0, 0])
        raise NotFiniteError(name, f"in unit {unit!r} near position {position}")


def _join(parts: Sequence[Divergence]) -> Divergence:
    return Divergence(
        np.concatenate([part.nll_reference for part in parts]),
        np.concatenate([part.nll_candidate for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.agrees for part in parts]),
    )
