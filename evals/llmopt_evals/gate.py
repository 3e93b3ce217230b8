"""The gate: looks at growing samples until every criterion passes or one fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt_evals.cache_evidence import CacheEvidence
from llmopt_evals.cloze import ClozeItem, ClozeOptions, make_items
from llmopt_evals.criteria import CACHE_METRICS, Criteria, judge_all
from llmopt_evals.errors import EvaluationError
from llmopt_evals.evidence import Evidence, concatenate, measure
from llmopt_evals.judging import (
    LookLevels,
    PairedTask,
    judge_look,
    no_cache,
    plan_looks,
)
from llmopt_evals.plot_data import plot_data, summary
from llmopt_evals.scorer import Progress, Scorer
from llmopt_evals.statistics import NUM_RESAMPLES, alpha_spending, resample_counts
from llmopt_evals.units import HeldOutText, Unit
from llmopt_evals.verdict import Look, NoiseFloor, Verdict

NUM_NOISE_UNITS = 8  # the floor is a yardstick, not a criterion: a few thousand tokens tell it


@dataclass(frozen=True, slots=True, eq=False)
class GateRun:
    """A verdict and what it rests on (for ``power.simulate``)."""

    verdict: Verdict
    evidence: Evidence


def run_gate(
    reference: Scorer,
    candidate: Scorer,
    *,
    text: HeldOutText,
    criteria: Criteria,
    baseline: Scorer | None = None,
    noise: Scorer | None = None,
    cloze: ClozeOptions | None = ClozeOptions(),  # noqa: B008  (frozen)
    tasks: Sequence[PairedTask] = (),
    cache: CacheEvidence | None = None,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
) -> GateRun:
    """Judge a candidate against its reference.

    Units are put in a seeded random order; each look scores the units it adds and no others.

    Args:
        reference: the source model.
        candidate: the model to judge.
        text: held-out, disjoint from calibration.
        criteria: what must hold.
        baseline: plain rounding in the same scheme, for the relative criterion; the candidate's
            own scorer if the candidate is plain rounding.
        noise: the source under another batch shape, for the noise floor.
        cloze: how cloze items are made; none makes none.
        tasks: paired task results (``tasks.run_tasks``), whole, judged at every look.
        cache: measured of the candidate's quantized cache, judged likewise.
        seed: of order, items and resamples.
        progress: told of what is scored.

    Raises:
        EvaluationError: too little text, a criterion on what is not measured.
        NotFiniteError: NaN or infinite logits.
    """
    by_name = {task.name: task for task in tasks}
    order = np.random.default_rng(seed).permutation(len(text.units))
    units = [text.units[i] for i in order]
    plan = plan_looks(len(units), criteria.looks)
    alphas = alpha_spending([n / len(units) for n in plan], 1 - criteria.confidence)
    samples = _samples(units, plan, text.bos_token_id, cloze, seed)
    _check_measurable(criteria, cloze, by_name, cache)
    evidence: Evidence | None = None
    floor: NoiseFloor | None = None
    looks: list[Look] = []
    for number, ((new_units, items), alpha) in enumerate(zip(samples, alphas, strict=True)):
        more, noise_kl = measure(
            new_units,
            items,
            reference,
            candidate,
            baseline=baseline,
            noise=noise if number == 0 else None,
            num_noise_units=NUM_NOISE_UNITS,
            progress=progress,
            label=f"evaluate, look {number + 1} of {len(plan)}",
        )
        evidence = more if evidence is None else concatenate(evidence, more)
        if len(noise_kl):
            floor = NoiseFloor(
                mean_kl=float(noise_kl.mean(dtype=np.float64)),
                p99_kl=float(np.quantile(noise_kl, 0.99)),
                num_tokens=len(noise_kl),
            )
        results = judge_look(
            evidence,
            criteria,
            LookLevels(alpha, alphas[-1], len(units)),
            tasks=by_name,
            noise_floor=None if floor is None else floor.mean_kl,
            counts=resample_counts(len(evidence.names), NUM_RESAMPLES, seed + number),
            cache=cache,
        )
        looks.append(
            Look(
                num_units=len(evidence.names),
                num_tokens=int(evidence.tokens.sum()),
                num_items=int(evidence.items.sum()),
                alpha=alpha,
                outcome=judge_all([result.outcome for result in results]),
                criteria=tuple(results),
            )
        )
        if looks[-1].outcome != "inconclusive":
            break
    assert evidence is not None
    verdict = _verdict(evidence, looks, plan, criteria, floor, text, baseline, seed, cache)
    return GateRun(verdict, evidence)


def check_text(
    text: HeldOutText, criteria: Criteria, cloze: ClozeOptions | None, seed: int
) -> None:
    """Hold that a text is enough for the planned looks, before any model is scored.

    Raises:
        EvaluationError: too little text for the cloze items.
    """
    order = np.random.default_rng(seed).permutation(len(text.units))
    units = [text.units[i] for i in order]
    plan = plan_looks(len(units), criteria.looks)
    _samples(units, plan, text.bos_token_id, cloze, seed)


def _samples(
    units: Sequence[Unit],
    plan: Sequence[int],
    bos_token_id: int | None,
    cloze: ClozeOptions | None,
    seed: int,
) -> list[tuple[Sequence[Unit], list[ClozeItem]]]:
    """New units and items of each look; later looks get items at the first one's density."""
    samples: list[tuple[Sequence[Unit], list[ClozeItem]]] = []
    first_size = sum(unit.num_predictions for unit in units[: plan[0]])
    for number, (start, stop) in enumerate(zip([0, *plan], plan, strict=False)):
        new = units[start:stop]
        items: list[ClozeItem] = []
        if cloze is not None:
            share = sum(unit.num_predictions for unit in new) / first_size
            items = make_items(
                new,
                round(cloze.num_items * share),
                cloze,
                least=cloze.num_items if number == 0 else 0,
                seed=seed + number,
                bos_token_id=bos_token_id,
            )
        samples.append((new, items))
    return samples


def _check_measurable(
    criteria: Criteria,
    cloze: ClozeOptions | None,
    tasks: dict[str, PairedTask],
    cache: CacheEvidence | None,
) -> None:
    """Refuse before the work what ``judge_look`` would refuse after it."""
    for criterion in criteria.criteria:
        if criterion.metric == "cloze_accuracy_drop" and cloze is None:
            raise EvaluationError(
                "cloze_accuracy_drop is asked for, but no cloze items are to be made",
                "give cloze options, or take the criterion out",
            )
        if criterion.task is not None and criterion.task not in tasks:
            raise EvaluationError(
                f"a criterion names the task {criterion.task!r}, which was not run",
                f"run it, or take the criterion out (run: {', '.join(tasks) or 'none'})",
            )
        if criterion.metric in CACHE_METRICS and cache is None:
            raise no_cache(criterion)


def _verdict(
    evidence: Evidence,
    looks: Sequence[Look],
    plan: Sequence[int],
    criteria: Criteria,
    floor: NoiseFloor | None,
    text: HeldOutText,
    baseline: Scorer | None,
    seed: int,
    cache: CacheEvidence | None,
) -> Verdict:
    notes = []
    if text.num_joined_sources:
        notes.append(f"{text.num_joined_sources} short sources were joined with neighbours")
    if text.num_dropped_tokens:
        notes.append(f"{text.num_dropped_tokens} tokens of short sources were left out")
    if criteria.relative is not None and baseline is None:
        notes.append("no plain rounding was given: the relative criterion was not judged")
    if len(plan) < criteria.looks:
        notes.append(f"{criteria.looks} looks were asked for; the units are enough for {len(plan)}")
    if cache is not None:
        notes += cache.notes()
    last = looks[-1]
    return Verdict(
        outcome=last.outcome,
        criteria=last.criteria,
        looks=tuple(looks),
        num_planned_looks=len(plan),
        num_available_units=len(text.units),
        num_units=last.num_units,
        num_tokens=last.num_tokens,
        num_items=last.num_items,
        criteria_asked=criteria,
        summary=summary(evidence),
        noise_floor=floor,
        plots=plot_data(evidence),
        notes=tuple(notes),
        seed=seed,
        kv_cache=None if cache is None else cache.result(),
    )
