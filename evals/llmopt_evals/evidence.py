"""What the gate measures: sums per unit, and the KL of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from llmopt_evals.cloze import ClozeItem, is_correct
from llmopt_evals.divergence import Divergence, measure_block
from llmopt_evals.scorer import Passage, Progress, Scorer, Scores
from llmopt_evals.units import Unit

Floats = NDArray[np.float64]
_ITEMS_PER_CALL = 256


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Per unit (``(units,) float64`` sums over its tokens or items) and per token.

    Attributes:
        names: of the units.
        tokens: predicted tokens.
        nll_reference: nats.
        nll_candidate: nats.
        kl: of the candidate, nats.
        kl_baseline: of plain rounding, nats, or none.
        agreements: tokens on which the most likely token is the same.
        items: cloze items.
        reference_correct: cloze items that the reference has right.
        candidate_correct: cloze items that the candidate has right.
        token_kl: ``(tokens,) float32``, units one after the other.
        token_unit: ``(tokens,) int32``.
        token_position: ``(tokens,) int32``, position in the block of the token that predicts.
    """

    names: tuple[str, ...]
    tokens: Floats
    nll_reference: Floats
    nll_candidate: Floats
    kl: Floats
    kl_baseline: Floats | None
    agreements: Floats
    items: Floats
    reference_correct: Floats
    candidate_correct: Floats
    token_kl: NDArray[np.float32]
    token_unit: NDArray[np.int32]
    token_position: NDArray[np.int32]

    def take(self, units: NDArray[np.int64]) -> Evidence:
        """The evidence of the units named, in that order, repeats allowed."""
        sizes = np.bincount(self.token_unit, minlength=len(self.names))
        starts = np.cumsum(sizes) - sizes
        tokens = np.concatenate([np.arange(starts[u], starts[u] + sizes[u]) for u in units])
        return replace(
            self,
            names=tuple(self.names[u] for u in units),
            tokens=self.tokens[units],
            nll_reference=self.nll_reference[units],
            nll_candidate=self.nll_candidate[units],
            kl=self.kl[units],
            kl_baseline=None if self.kl_baseline is None else self.kl_baseline[units],
            agreements=self.agreements[units],
            items=self.items[units],
            reference_correct=self.reference_correct[units],
            candidate_correct=self.candidate_correct[units],
            token_kl=self.token_kl[tokens],
            token_unit=np.repeat(np.arange(len(units), dtype=np.int32), sizes[units]),
            token_position=self.token_position[tokens],
        )


def concatenate(first: Evidence, second: Evidence) -> Evidence:
    """The evidence of more units after that of some."""
    baselines = (first.kl_baseline, second.kl_baseline)
    return Evidence(
        names=first.names + second.names,
        tokens=np.concatenate([first.tokens, second.tokens]),
        nll_reference=np.concatenate([first.nll_reference, second.nll_reference]),
        nll_candidate=np.concatenate([first.nll_candidate, second.nll_candidate]),
        kl=np.concatenate([first.kl, second.kl]),
        kl_baseline=(
            None
            if baselines[0] is None or baselines[1] is None
            else np.concatenate([baselines[0], baselines[1]])
        ),
        agreements=np.concatenate([first.agreements, second.agreements]),
        items=np.concatenate([first.items, second.items]),
        reference_correct=np.concatenate([first.reference_correct, second.reference_correct]),
        candidate_correct=np.concatenate([first.candidate_correct, second.candidate_correct]),
        token_kl=np.concatenate([first.token_kl, second.token_kl]),
        token_unit=np.concatenate(
            [first.token_unit, second.token_unit + np.int32(len(first.names))]
        ),
        token_position=np.concatenate([first.token_position, second.token_position]),
    )


def measure(
    units: Sequence[Unit],
    items: Sequence[ClozeItem],
    reference: Scorer,
    candidate: Scorer,
    *,
    baseline: Scorer | None,
    noise: Scorer | None,
    num_noise_units: int,
    progress: Progress,
    label: str,
) -> tuple[Evidence, NDArray[np.float32]]:
    """Score the units' blocks and the items; each scorer is asked once for all it must score.

    Args:
        units: their blocks are scored by all scorers.
        items: scored by reference and candidate; ``item.unit`` is an index into ``units``.
        reference: the source model.
        candidate: the model to judge.
        baseline: plain rounding; may be the candidate itself, which is then not scored twice.
        noise: the source model under another batch shape.
        num_noise_units: how many of the units the noise scorer scores.
        progress: told of the predicted tokens and items done.
        label: of the task that progress is told of.

    Returns:
        The evidence, and the noise scorer's KL per token (empty without one).

    Raises:
        NotFiniteError: NaN or infinite logits; names the model.
    """
    blocks: list[Passage] = [block for unit in units for block in unit.blocks]
    passages = [*blocks, *(item.branches for item in items)]
    noisy = blocks[: sum(len(unit.blocks) for unit in units[:num_noise_units])] if noise else []
    scores = {
        "reference": reference.score(passages),
        "candidate": candidate.score(passages),
    }
    if baseline is not None and baseline is not candidate:
        scores["baseline"] = baseline.score(blocks)
    if noise is not None and noisy:
        scores["source under another batch shape"] = noise.score(noisy)
    total = sum(unit.num_predictions for unit in units) + len(items)
    rows: list[dict[str, list[Divergence]]] = []
    done = sequence = 0
    for unit in units:
        row: dict[str, list[Divergence]] = {}
        for block in unit.blocks:
            others = [name for name in scores if name != "reference"]
            if sequence >= len(noisy):
                others = [name for name in others if not name.startswith("source")]
            measured = measure_block(
                block,
                sequence,
                scores["reference"],
                [scores[name] for name in others],
                others,
                unit.name,
            )
            for name, divergence in zip(others, measured, strict=True):
                row.setdefault(name, []).append(divergence)
            sequence += 1
        rows.append(row)
        done += unit.num_predictions
        progress(label, done, total)
    correct = [
        _correct(
            name,
            scores[name],
            items,
            len(blocks),
            len(units),
            progress,
            (label, done, total, share),
        )
        for share, name in enumerate(("reference", "candidate"), start=1)
    ]
    noise_kl = [
        d.kl for row in rows for name in row if name.startswith("source") for d in row[name]
    ]
    counts = np.bincount([item.unit for item in items], minlength=len(units)).astype(np.float64)
    evidence = _collect(units, rows, counts, correct, baseline is not None)
    return evidence, np.concatenate(noise_kl) if noise_kl else np.zeros(0, np.float32)


def _correct(
    model: str,
    scores: Scores,
    items: Sequence[ClozeItem],
    offset: int,
    num_units: int,
    progress: Progress,
    place: tuple[str, int, int, int],
) -> Floats:
    """Items answered rightly, per unit. Two models share the items' part of the progress bar."""
    label, done, total, share = place
    correct = np.zeros(num_units)
    for first in range(0, len(items), _ITEMS_PER_CALL):
        some = items[first : first + _ITEMS_PER_CALL]
        with torch.inference_mode():
            answers = scores.branch_logprobs(range(offset + first, offset + first + len(some)))
        for item, logprobs in zip(some, answers, strict=True):
            correct[item.unit] += is_correct(item, logprobs, model)
        behind = len(items) * (share - 1) + first + len(some)
        progress(label, min(total, done + behind // 2), total)
    return correct


def _collect(
    units: Sequence[Unit],
    rows: Sequence[dict[str, list[Divergence]]],
    items: Floats,
    correct: Sequence[Floats],
    has_baseline: bool,
) -> Evidence:
    def sums(name: str, field: str) -> Floats:
        return np.array(
            [sum(float(getattr(d, field).sum(dtype=np.float64)) for d in row[name]) for row in rows]
        )

    sizes = [unit.num_predictions for unit in units]
    baseline = "baseline" if "baseline" in rows[0] else "candidate"
    return Evidence(
        names=tuple(unit.name for unit in units),
        tokens=np.array(sizes, dtype=np.float64),
        nll_reference=sums("candidate", "nll_reference"),
        nll_candidate=sums("candidate", "nll_candidate"),
        kl=sums("candidate", "kl"),
        kl_baseline=sums(baseline, "kl") if has_baseline else None,
        agreements=sums("candidate", "agrees"),
        items=items,
        reference_correct=correct[0],
        candidate_correct=correct[1],
        token_kl=np.concatenate([d.kl for row in rows for d in row["candidate"]]),
        token_unit=np.repeat(np.arange(len(units), dtype=np.int32), sizes),
        token_position=np.concatenate(
            [np.arange(len(block) - 1, dtype=np.int32) for unit in units for block in unit.blocks]
        ),
    )
