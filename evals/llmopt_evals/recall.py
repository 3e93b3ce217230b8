"""Key-value recall: pairs strewn into held-out text, each asked for at its end.

A passage is text with ``num_pairs`` pairs in it at even distances, every pair two tokens that are
its key and one that is its value; behind the text each key is repeated, in an order of its own,
with the right value after it. Who retrieves gives the value a larger logit, after its key, than the
values of three other pairs of the passage. Tokens are the text's own, so that no tokenizer is asked
and the task is there for any model; one that cannot do it shows that by chance-level accuracy, and
then nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmopt_evals.errors import EvaluationError, NotFiniteError
from llmopt_evals.long_context import LongContextOptions, flatten
from llmopt_evals.scorer import Scorer
from llmopt_evals.statistics import NUM_RESAMPLES, Interval, ratio_interval, resample_counts
from llmopt_evals.units import HeldOutText

NUM_CHOICES = 4
NUM_DEPTHS = 4
CHANCE = 1 / NUM_CHOICES
MIN_ABOVE_CHANCE = 0.1
"""A length counts if the source's accuracy there lies this far above chance, its interval whole."""

_KEY_TOKENS = 2
_PAIR_TOKENS = _KEY_TOKENS + 1
_NUM_LENGTHS = 4
_MOST_FREQUENT = 64  # left out: they follow anything
_POOL = 2048

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RecallPassage:
    """One passage and its questions, in the order that they are asked.

    Attributes:
        token_ids: ``(T,) int64``.
        rows: ``(questions,) int64``, the last token of each key; its logits answer.
        choices: ``(questions, 4) int64``, the right value first.
        depths: ``(questions,) int64``, quarter of the text that the pair lies in, 0 the farthest.
    """

    token_ids: Tensor
    rows: Tensor
    choices: Tensor
    depths: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RecallResult:
    """Answers at one length.

    Attributes:
        num_tokens: of a passage.
        depths: ``(passages, questions) int64``.
        reference_correct: likewise, bool.
        candidate_correct: likewise, bool.
        reference_accuracy: over all, with its interval (passages resampled).
    """

    num_tokens: int
    depths: NDArray[np.int64]
    reference_correct: Bools
    candidate_correct: Bools
    reference_accuracy: Interval

    @property
    def is_informative(self) -> bool:
        """Whether the source can do the task at this length."""
        return self.reference_accuracy.low > CHANCE + MIN_ABOVE_CHANCE


def recall_lengths(num_tokens: int, num_pairs: int) -> list[int]:
    """The context's length and its halves, longest last, as far as pairs fit in.

    Raises:
        EvaluationError: they do not even fit into the context.
    """
    least = 2 * (2 * num_pairs * _PAIR_TOKENS)
    lengths = [num_tokens >> power for power in range(_NUM_LENGTHS)]
    kept = sorted(length for length in lengths if length >= least)
    if not kept:
        raise EvaluationError(
            f"a context of {num_tokens} tokens is too short to recall {num_pairs} pairs in; they "
            f"need {least}",
            "give fewer with gate.long_context.recall_pairs",
        )
    return kept


def make_passages(
    text: HeldOutText, num_tokens: int, options: LongContextOptions, seed: int
) -> list[RecallPassage]:
    """Passages of one length.

    Raises:
        EvaluationError: the text has too few different tokens, or is shorter than a passage.
    """
    tokens = flatten(text, seed).numpy()
    pool = _pool(tokens, options.recall_pairs)
    rng = np.random.default_rng([seed, num_tokens])
    head = [] if text.bos_token_id is None else [text.bos_token_id]
    return [
        _passage(tokens, pool, num_tokens, options.recall_pairs, head, rng)
        for _ in range(options.recall_passages)
    ]


def _pool(tokens: NDArray[np.int64], num_pairs: int) -> NDArray[np.int64]:
    """What keys and values are drawn from: tokens of the text, neither common nor the rarest."""
    found, counts = np.unique(tokens, return_counts=True)
    by_frequency = found[np.argsort(-counts, kind="stable")]
    skipped = min(_MOST_FREQUENT, len(found) // 4)
    pool = by_frequency[skipped : skipped + _POOL]
    if len(pool) < num_pairs * _PAIR_TOKENS:
        raise EvaluationError(
            f"the held-out text has {len(found)} different tokens, too few for {num_pairs} pairs "
            "of keys and values",
            "give more held-out text, or fewer pairs with gate.long_context.recall_pairs",
        )
    return pool


def _passage(
    tokens: NDArray[np.int64],
    pool: NDArray[np.int64],
    num_tokens: int,
    num_pairs: int,
    head: list[int],
    rng: np.random.Generator,
) -> RecallPassage:
    room = num_tokens - len(head) - 2 * num_pairs * _PAIR_TOKENS
    start = int(rng.integers(0, max(1, len(tokens) - room)))
    text = tokens[start : start + room]
    if len(text) < room:
        raise EvaluationError(
            f"the held-out text has {len(tokens)} tokens, a recall passage {num_tokens}",
            "give more held-out text",
        )
    pairs = rng.permutation(pool)[: num_pairs * _PAIR_TOKENS].reshape(num_pairs, _PAIR_TOKENS)
    bounds = [round(i * room / num_pairs) for i in range(num_pairs + 1)]
    parts: list[NDArray[np.int64]] = [np.array(head, dtype=np.int64)]
    for index, pair in enumerate(pairs):
        parts += [pair, text[bounds[index] : bounds[index + 1]]]
    asked = rng.permutation(num_pairs)
    parts += [pairs[index] for index in asked]
    first = num_tokens - num_pairs * _PAIR_TOKENS
    values = pairs[:, _KEY_TOKENS]
    choices = [
        [values[index], *rng.choice(np.delete(values, index), NUM_CHOICES - 1, replace=False)]
        for index in asked
    ]
    return RecallPassage(
        token_ids=torch.from_numpy(np.concatenate(parts)),
        rows=first + torch.arange(num_pairs) * _PAIR_TOKENS + _KEY_TOKENS - 1,
        choices=torch.tensor(np.array(choices)),
        depths=torch.from_numpy(asked * NUM_DEPTHS // num_pairs),
    )


@torch.inference_mode()
def measure_recall(
    text: HeldOutText,
    num_tokens: int,
    reference: Scorer,
    candidate: Scorer,
    options: LongContextOptions,
    seed: int,
) -> list[RecallResult]:
    """Ask both models at every length up to ``num_tokens``; each scores all passages at once.

    Raises:
        EvaluationError: the text is too short or too uniform for such passages.
        NotFiniteError: NaN logits; names the model.
    """
    lengths = recall_lengths(num_tokens, options.recall_pairs)
    passages = {length: make_passages(text, length, options, seed) for length in lengths}
    every = [passage for length in lengths for passage in passages[length]]
    answers = [
        _answers(name, scorer, every)
        for name, scorer in (("reference", reference), ("candidate", candidate))
    ]
    results = []
    for index, length in enumerate(lengths):
        rows = slice(index * options.recall_passages, (index + 1) * options.recall_passages)
        correct = answers[0][rows]
        results.append(
            RecallResult(
                num_tokens=length,
                depths=np.stack([passage.depths.numpy() for passage in passages[length]]),
                reference_correct=correct,
                candidate_correct=answers[1][rows],
                reference_accuracy=_accuracy(correct),
            )
        )
    return results


def _answers(name: str, scorer: Scorer, passages: Sequence[RecallPassage]) -> Bools:
    """``(passages, questions)``, whether the right value has the largest logit of the four."""
    scores = scorer.score([passage.token_ids for passage in passages])
    correct = []
    for index, passage in enumerate(passages):
        first, last = int(passage.rows[0]), int(passage.rows[-1]) + 1
        logits = scores.logits(index, first, last)[passage.rows - first].cpu()
        chosen = logits.gather(1, passage.choices)
        if bool(torch.isnan(chosen).any()):
            raise NotFiniteError(name, f"in recall passage {index}")
        correct.append((chosen[:, 0] > chosen[:, 1:].amax(1)).numpy())
    return np.stack(correct)


def _accuracy(correct: Bools) -> Interval:
    counts = resample_counts(len(correct), NUM_RESAMPLES, seed=0)
    sizes = np.full(len(correct), float(correct.shape[1]))
    return ratio_interval(correct.sum(1).astype(np.float64), sizes, counts, alpha=0.05)
