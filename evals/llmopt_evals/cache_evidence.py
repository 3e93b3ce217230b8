"""What a gate rests on that judges a quantized cache: its KL over long contexts, and recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt_evals.long_context import (
    CacheDivergence,
    LongContextOptions,
    context_tokens,
    join_contexts,
    measure_cache,
)
from llmopt_evals.recall import (
    CHANCE,
    NUM_DEPTHS,
    RecallResult,
    make_passages,
    measure_recall,
    recall_lengths,
)
from llmopt_evals.scorer import Progress, Scorer
from llmopt_evals.statistics import Floats, Interval, ratio_interval, resample_counts
from llmopt_evals.units import HeldOutText
from llmopt_evals.verdict import CacheResult, PositionBucket, RecallCell, RecallLength

_FAR_BELOW = 2  # contexts of less than the model's own over this are worth a note


@dataclass(frozen=True, slots=True, eq=False)
class CacheEvidence:
    """Measured whole, before the first look, and judged at every one.

    Attributes:
        label: the cache in words.
        divergence: over long contexts.
        recall: by length, longest last.
        context_length: the model's own, or ``None`` without a limit.
    """

    label: str
    divergence: CacheDivergence
    recall: Sequence[RecallResult]
    context_length: int | None = None

    @property
    def informative(self) -> list[RecallResult]:
        """The lengths at which the source recalls at all."""
        return [result for result in self.recall if result.is_informative]

    @property
    def num_contexts(self) -> int:
        """What is resampled for the cache's KL."""
        return len(self.divergence.kl)

    @property
    def num_passages(self) -> int:
        """What is resampled for recall."""
        return sum(len(result.depths) for result in self.informative)

    def kl_interval(self, num_resamples: int, alpha: float) -> Interval:
        """Of the mean KL from the 16-bit cache; contexts are resampled."""
        counts = resample_counts(self.num_contexts, num_resamples, seed=0)
        return ratio_interval(self.divergence.kl, self.divergence.tokens, counts, alpha)

    def recall_interval(self, num_resamples: int, alpha: float) -> Interval:
        """Of the accuracy lost at the informative lengths; passages are resampled."""
        drops: list[Floats] = [
            (r.reference_correct.astype(np.float64) - r.candidate_correct).sum(1)
            for r in self.informative
        ]
        drop = np.concatenate(drops)
        sizes = np.full(len(drop), float(self.recall[0].depths.shape[1]))
        counts = resample_counts(len(drop), num_resamples, seed=0)
        return ratio_interval(drop, sizes, counts, alpha)

    def notes(self) -> list[str]:
        """What was not judged, a sentence each."""
        return [*self._length_notes(), *self._recall_notes()]

    def _length_notes(self) -> list[str]:
        judged, own = self.divergence.num_tokens, self.context_length
        if own is None or _FAR_BELOW * judged >= own:
            return []
        return [
            f"the cache was judged on contexts of {judged:,} tokens; nothing is said of longer "
            f"ones, up to the model's own {own:,}"
        ]

    def _recall_notes(self) -> list[str]:
        without = [f"{r.num_tokens:,}" for r in self.recall if not r.is_informative]
        if not without:
            return []
        lengths = f"passages of {', '.join(without)} tokens"
        if len(without) == len(self.recall):
            return [
                f"recall is not informative: the source itself is near chance ({CHANCE:.0%}) in "
                f"{lengths}, so kv_recall_drop was not judged"
            ]
        return [f"recall is not informative in {lengths}: the source itself is near chance there"]

    def result(self) -> CacheResult:
        """For the verdict."""
        return CacheResult(
            label=self.label,
            num_context_tokens=self.divergence.num_tokens,
            num_contexts=self.num_contexts,
            positions=tuple(
                PositionBucket(
                    start=start,
                    stop=stop,
                    num_tokens=(stop - start) * self.num_contexts,
                    mean_kl=kl,
                )
                for start, stop, kl in self.divergence.buckets()
            ),
            chance=CHANCE,
            recall=tuple(_length(result) for result in self.recall),
        )


def check_cache_text(
    text: HeldOutText,
    context_length: int | None,
    options: LongContextOptions,
    seed: int,
    first_quantized: int = 0,
) -> None:
    """Hold that a text is enough to judge a cache on, before any model is scored.

    Raises:
        EvaluationError: too little or too uniform a text, too short a context, positions that would
            be judged and lie before ``first_quantized``, the first that reads anything quantized.
    """
    num_tokens = context_tokens(text, context_length, options, first_quantized)
    for length in recall_lengths(num_tokens, options.recall_pairs):
        make_passages(text, length, options, seed)


def measure_cache_evidence(
    label: str,
    text: HeldOutText,
    *,
    context_length: int | None,
    reference: Scorer,
    candidate: Scorer,
    sixteen_bit: Scorer,
    options: LongContextOptions,
    seed: int,
    progress: Progress,
    first_quantized: int = 0,
) -> CacheEvidence:
    """Score long contexts and recall passages.

    Args:
        label: the cache in words.
        text: held out.
        context_length: the model's, or ``None`` without a limit.
        reference: the source.
        candidate: with its cache.
        sixteen_bit: the candidate with a 16-bit cache.
        options: how much of it.
        seed: of joining, pairs and places.
        progress: told of both.
        first_quantized: the first position whose query reads anything quantized.

    Raises:
        EvaluationError: as ``check_cache_text``, before anything is scored.
        NotFiniteError: NaN or infinite logits; names the model.
    """
    num_tokens = context_tokens(text, context_length, options, first_quantized)
    progress("judge the cache", 0, 2)
    contexts = join_contexts(text, num_tokens, options.num_contexts, seed)
    divergence = measure_cache(contexts, candidate, sixteen_bit)
    progress("judge the cache", 1, 2)
    recall = measure_recall(text, num_tokens, reference, candidate, options, seed)
    progress("judge the cache", 2, 2)
    return CacheEvidence(label, divergence, recall, context_length)


def _length(result: RecallResult) -> RecallLength:
    cells = []
    for depth in range(NUM_DEPTHS):
        there = result.depths == depth
        cells.append(
            RecallCell(
                depth=depth,
                num_items=int(there.sum()),
                source_accuracy=float(result.reference_correct[there].mean()),
                candidate_accuracy=float(result.candidate_correct[there].mean()),
            )
        )
    return RecallLength(
        num_tokens=result.num_tokens,
        num_items=result.depths.size,
        source_accuracy=float(result.reference_correct.mean()),
        candidate_accuracy=float(result.candidate_correct.mean()),
        is_informative=result.is_informative,
        depths=tuple(cells),
    )
