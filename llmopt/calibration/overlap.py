"""Evaluation text that calibration has seen is dropped, counted, and refused when it is too much.

A document overlaps when its text is that of a calibration document, or when more than
``MAX_SHARED_NGRAMS`` of its distinct 13-grams of tokens stand in the calibration text. 13 is the
length that Brown et al. (2020, appendix C) found long enough not to be chance; a share instead of
a single hit, because a licence line, a system prompt or a rule of dashes is no leak: of the
built-in evaluation documents, apart from calibration by construction, a tenth share some 13-gram,
and none more than 5 % of its own.

A 13-gram that stands in many calibration documents (``MIN_COMMON_DOCUMENTS`` of them and more than
``MAX_COMMON_SHARE``) is no leak either but what all such text has: the system prompt that a chat
template writes, a licence head. What it covers is cut away before the share is taken, so that
a conversation is judged by what is its own. A document that is a copy as a whole is found anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmopt.errors import BadInputError

NGRAM_TOKENS = 13
MAX_SHARED_NGRAMS = 0.05
MAX_OVERLAPPING_DOCUMENTS = 0.05
MIN_COMMON_DOCUMENTS = 3
MAX_COMMON_SHARE = 0.01

TokenDocument = tuple[str, Tensor]
"""Name and token ids ``(T,) int64``, without the tokenizer's own prefix."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What was found.

    Attributes:
        kept: positions in the evaluation documents that stay, ascending.
        dropped: names of those that overlap.
    """

    kept: tuple[int, ...]
    dropped: tuple[str, ...]

    @property
    def share(self) -> float:
        """Dropped documents over all evaluation documents."""
        return len(self.dropped) / max(1, len(self.dropped) + len(self.kept))


def find_overlap(
    evaluation: Sequence[TokenDocument], calibration: Iterable[TokenDocument]
) -> Overlap:
    """Find the evaluation documents that overlap the calibration text.

    Raises:
        BadInputError: if more than ``MAX_OVERLAPPING_DOCUMENTS`` of them do.
    """
    # By content: copies of one text among the calibration documents do not make it common.
    distinct = {tokens.numpy().tobytes(): tokens for _, tokens in calibration}
    rare, common = _seen_ngrams(list(distinct.values()))
    kept: list[int] = []
    dropped: list[str] = []
    for index, (name, tokens) in enumerate(evaluation):
        is_copy = tokens.numpy().tobytes() in distinct
        if is_copy or _shared_share(tokens, rare, common) > MAX_SHARED_NGRAMS:
            dropped.append(name)
        else:
            kept.append(index)
    overlap = Overlap(tuple(kept), tuple(dropped))
    if overlap.share > MAX_OVERLAPPING_DOCUMENTS:
        raise BadInputError(
            f"{len(dropped)} of {len(evaluation)} evaluation documents overlap the calibration "
            f"text ({overlap.share:.1%}; at most {MAX_OVERLAPPING_DOCUMENTS:.0%} may), for "
            f"example {', '.join(dropped[:3])}",
            "give an evaluation text that is apart from the calibration text, or remove the "
            "documents that both have",
        )
    return overlap


def _seen_ngrams(documents: Sequence[Tensor]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes of the calibration text's n-grams, sorted: (those of few documents, of many)."""
    parts = [np.unique(ngram_hashes(tokens)) for tokens in documents]
    seen, num_documents = np.unique(
        np.concatenate([np.empty(0, np.uint64), *parts]), return_counts=True
    )
    is_common = (num_documents >= MIN_COMMON_DOCUMENTS) & (
        num_documents > MAX_COMMON_SHARE * len(documents)
    )
    return seen[~is_common], seen[is_common]


def _shared_share(tokens: Tensor, rare: NDArray[np.uint64], common: NDArray[np.uint64]) -> float:
    """Share in ``rare`` of the distinct n-grams that touch no token covered by ``common``."""
    hashes = ngram_hashes(tokens)
    covered = np.zeros(len(tokens), np.int64)
    for start in np.flatnonzero(_is_in(hashes, common)):
        covered[start : start + NGRAM_TOKENS] = 1
    before = np.concatenate([[0], np.cumsum(covered)])
    own = np.unique(hashes[before[NGRAM_TOKENS:] == before[:-NGRAM_TOKENS]])
    return float(np.mean(_is_in(own, rare))) if own.size else 0.0


def _is_in(values: NDArray[np.uint64], ascending: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not ascending.size:
        return np.zeros(values.shape, np.bool_)
    places = np.minimum(np.searchsorted(ascending, values), ascending.size - 1)
    found: NDArray[np.bool_] = ascending[places] == values
    return found


def ngram_hashes(tokens: Tensor, size: int = NGRAM_TOKENS) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of ``size`` tokens: ``(T - size + 1,)``, empty when shorter."""
    ids = tokens.numpy().astype(np.uint64)
    count = ids.size - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(size):
        hashes = (hashes ^ _mix(ids[offset : offset + count])) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread neighbouring ids over 64 bits (the finaliser of SplitMix64)."""
    mixed = (values + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    return mixed * np.uint64(0x94D049BB133111EB)
