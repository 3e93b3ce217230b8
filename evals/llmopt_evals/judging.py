"""From evidence to outcomes: each criterion's interval at one look, and the looks' plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmopt_evals.cache_evidence import CacheEvidence
from llmopt_evals.criteria import (
    BETTER,
    CACHE_METRICS,
    Criteria,
    Criterion,
    RelativeCriterion,
    judge,
    judge_either,
)
from llmopt_evals.errors import EvaluationError
from llmopt_evals.evidence import Evidence
from llmopt_evals.statistics import (
    Floats,
    Interval,
    power_at,
    quantile_interval,
    ratio_interval,
    resample_counts,
    units_needed,
)
from llmopt_evals.units import MIN_UNITS
from llmopt_evals.verdict import CriterionResult, NoiseBound

_MAX_TASK_GROUPS = 500  # items are independent: resampling groups of them is as good, and small


@dataclass(frozen=True, slots=True, eq=False)
class PairedTask:
    """Per item: whether each model was right, ``(items,) bool``, in the same order."""

    name: str
    reference_correct: NDArray[np.bool_]
    candidate_correct: NDArray[np.bool_]


def plan_looks(num_units: int, looks: int) -> list[int]:
    """Units at each look: equal steps, none with fewer than the least number of units."""
    steps = {max(MIN_UNITS, math.ceil(num_units * k / looks)) for k in range(1, looks)}
    return [*sorted(step for step in steps if step < num_units), num_units]


@dataclass(frozen=True, slots=True)
class LookLevels:
    """What a look is judged at: its own alpha, the last look's, and both sample sizes."""

    alpha: float
    last_alpha: float
    num_planned_units: int


def judge_look(
    evidence: Evidence,
    criteria: Criteria,
    levels: LookLevels,
    *,
    tasks: Mapping[str, PairedTask],
    noise_floor: float | None,
    counts: Floats,
    cache: CacheEvidence | None = None,
) -> list[CriterionResult]:
    """Each criterion at one look; the relative one last, where there is a baseline.

    Args:
        evidence: of the units so far.
        criteria: what is asked.
        levels: alphas and sample sizes.
        tasks: paired results by task name.
        noise_floor: nats a token, or none if it was not measured.
        counts: resamples of the evidence's units.
        cache: measured of a quantized cache.

    Raises:
        EvaluationError: a criterion asks for what was not measured.
    """
    results = []
    for criterion in criteria.criteria:
        if criterion.metric in CACHE_METRICS:
            if cache is None:
                raise no_cache(criterion)
            if criterion.metric == "kv_mean_kl" or cache.informative:
                results.append(_of_cache(criterion, cache, criteria, levels, len(counts)))
            continue
        interval = _interval(criterion, evidence, tasks, counts, levels.alpha)
        results.append(_result(criterion, interval, evidence, criteria, levels))
    if criteria.relative is not None and evidence.kl_baseline is not None:
        results.append(
            _relative(criteria.relative, evidence, criteria, levels, noise_floor, counts)
        )
    return results


def _interval(
    criterion: Criterion,
    evidence: Evidence,
    tasks: Mapping[str, PairedTask],
    counts: Floats,
    alpha: float,
) -> Interval:
    """In the scale where it is tested: a ratio of perplexities as its logarithm."""
    match criterion.metric:
        case "perplexity_ratio":
            change = evidence.nll_candidate - evidence.nll_reference
            return ratio_interval(change, evidence.tokens, counts, alpha)
        case "mean_kl":
            return ratio_interval(evidence.kl, evidence.tokens, counts, alpha)
        case "p99_kl":
            return quantile_interval(evidence.token_kl, evidence.token_unit, counts, alpha)
        case "top1_agreement":
            return ratio_interval(evidence.agreements, evidence.tokens, counts, alpha)
        case "cloze_accuracy_drop":
            if not evidence.items.any():
                raise EvaluationError(
                    "cloze_accuracy_drop is asked for, but no cloze items were scored",
                    "give cloze options, or take the criterion out",
                )
            drop = evidence.reference_correct - evidence.candidate_correct
            return ratio_interval(drop, evidence.items, counts, alpha)
        case "task_accuracy_drop":
            if criterion.task is None or criterion.task not in tasks:
                raise EvaluationError(
                    f"a criterion names the task {criterion.task!r}, which was not run",
                    f"run it, or take the criterion out (run: {', '.join(tasks) or 'none'})",
                )
            return _task_interval(tasks[criterion.task], len(counts), alpha)
        case "kv_mean_kl" | "kv_recall_drop":
            raise AssertionError("criteria on the cache are judged on long contexts")


def no_cache(criterion: Criterion) -> EvaluationError:
    """The error for a criterion on a cache where there is none."""
    return EvaluationError(
        f"{criterion.metric} is asked for, but the candidate has no quantized cache",
        "give the recipe a kv_cache section, or take the criterion out",
    )


def _of_cache(
    criterion: Criterion,
    cache: CacheEvidence,
    criteria: Criteria,
    levels: LookLevels,
    num_resamples: int,
) -> CriterionResult:
    """A criterion on the cache, whose sample is whole at every look."""
    if criterion.metric == "kv_mean_kl":
        interval, num_units = cache.kl_interval(num_resamples, levels.alpha), cache.num_contexts
    else:
        interval, num_units = cache.recall_interval(num_resamples, levels.alpha), cache.num_passages
    power, units = _power(
        interval.estimate,
        criterion.margin,
        interval,
        num_units,
        criteria,
        LookLevels(levels.alpha, levels.last_alpha, num_units),
    )
    return CriterionResult(
        name=criterion.name,
        better="lower",
        margin=criterion.margin,
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        confidence=1 - levels.alpha,
        outcome=judge(interval, criterion.margin, "lower"),
        power=power,
        units_for_power=units,
    )


def _task_interval(task: PairedTask, num_resamples: int, alpha: float) -> Interval:
    drop = task.reference_correct.astype(np.float64) - task.candidate_correct.astype(np.float64)
    groups = min(len(drop), _MAX_TASK_GROUPS)
    group = np.random.default_rng(0).permutation(len(drop)) % groups
    sizes = np.bincount(group, minlength=groups).astype(np.float64)
    counts = resample_counts(groups, num_resamples, seed=0)
    drops = np.bincount(group, weights=drop, minlength=groups).astype(np.float64)
    return ratio_interval(drops, sizes, counts, alpha)


def _result(
    criterion: Criterion,
    interval: Interval,
    evidence: Evidence,
    criteria: Criteria,
    levels: LookLevels,
) -> CriterionResult:
    better, margin = BETTER[criterion.metric], criterion.margin
    tested = math.log(margin) if criterion.metric == "perplexity_ratio" else margin
    sign = 1.0 if better == "lower" else -1.0
    power, units = _power(
        sign * interval.estimate, sign * tested, interval, len(evidence.names), criteria, levels
    )
    shown = _exp(interval) if criterion.metric == "perplexity_ratio" else interval
    return CriterionResult(
        name=criterion.name,
        better=better,
        margin=margin,
        estimate=shown.estimate,
        low=shown.low,
        high=shown.high,
        confidence=1 - levels.alpha,
        outcome=judge(interval, tested, better),
        power=power,
        units_for_power=units,
    )


def _exp(interval: Interval) -> Interval:
    low, high = math.exp(min(interval.low, 700.0)), math.exp(min(interval.high, 700.0))
    return Interval(math.exp(min(interval.estimate, 700.0)), low, high, interval.standard_error)


def _power(
    effect: float,
    margin: float,
    interval: Interval,
    num_units: int,
    criteria: Criteria,
    levels: LookLevels,
) -> tuple[float, int | None]:
    """Power at the last planned look, and the units that the wanted power needs."""
    last_error = interval.standard_error * math.sqrt(num_units / levels.num_planned_units)
    return (
        power_at(effect, margin, last_error, levels.last_alpha),
        units_needed(
            effect,
            margin,
            interval.standard_error,
            num_units,
            levels.last_alpha,
            criteria.power,
        ),
    )


def _relative(
    relative: RelativeCriterion,
    evidence: Evidence,
    criteria: Criteria,
    levels: LookLevels,
    noise_floor: float | None,
    counts: Floats,
) -> CriterionResult:
    """KL above plain rounding's, or else below a multiple of the noise floor.

    Either arm suffices, so where both are open each is tested at half of the alpha. A candidate
    that *is* plain rounding has a difference of exactly zero, and passes.
    """
    assert evidence.kl_baseline is not None
    alpha = levels.alpha if noise_floor is None else levels.alpha / 2
    excess = evidence.kl - relative.allowed_ratio * evidence.kl_baseline
    interval = ratio_interval(excess, evidence.tokens, counts, alpha)
    outcomes = [judge(interval, 0.0, "lower")]
    noise_bound = None
    if noise_floor is not None:
        own = ratio_interval(evidence.kl, evidence.tokens, counts, alpha)
        bound = relative.noise_multiple * noise_floor
        noise_bound = NoiseBound(
            estimate=own.estimate,
            low=own.low,
            high=own.high,
            bound=bound,
            outcome=judge(own, bound, "lower"),
        )
        outcomes.append(noise_bound.outcome)
    power, units = _power(interval.estimate, 0.0, interval, len(evidence.names), criteria, levels)
    return CriterionResult(
        name="kl_above_baseline",
        better="lower",
        margin=0.0,
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        confidence=1 - alpha,
        outcome=judge_either(outcomes),
        power=power,
        units_for_power=units,
        noise_bound=noise_bound,
    )
