"""How often would the gate be wrong? Simulated gates from the units of one finished run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmopt_evals.criteria import CACHE_METRICS, Criteria, Criterion, Outcome, judge_all
from llmopt_evals.evidence import Evidence
from llmopt_evals.judging import LookLevels, judge_look, plan_looks
from llmopt_evals.statistics import Floats, alpha_spending, resample_counts


class PowerRow(BaseModel):
    """Shares of simulated gates.

    Attributes:
        criterion: its name, or ``all`` for the whole verdict.
        false_pass: passes with the true effect exactly on the margin (none for ``all``).
        false_fail: failures with the true effect exactly on the margin (none for ``all``).
        passes: passes with the effect as measured: the power, for a sound candidate.
        fails: failures with the effect as measured.
        mean_looks: looks until a decision, with the effect as measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    criterion: str
    false_pass: float | None
    false_fail: float | None
    passes: float
    fails: float
    mean_looks: float


def simulate(
    evidence: Evidence,
    criteria: Criteria,
    *,
    num_gates: int = 400,
    num_resamples: int = 2000,
    noise_floor: float | None = None,
    seed: int = 0,
) -> list[PowerRow]:
    """Operating characteristics of the gate on text and a candidate like those measured.

    The measured units stand for the population: each simulated gate draws as many with
    replacement and goes through its looks. For the error rates the measured effect is shifted,
    every unit alike, to lie exactly on the margin. Task criteria are left out.

    Args:
        evidence: of a run that made its last look (all units).
        criteria: the gate's.
        num_gates: simulated, for each row and effect.
        num_resamples: of the bootstrap inside each.
        noise_floor: for the relative criterion.
        seed: of everything.
    """
    without_units = ("task_accuracy_drop", *CACHE_METRICS)
    asked = tuple(c for c in criteria.criteria if c.metric not in without_units)
    simulation = _Simulation(evidence, num_gates, num_resamples, noise_floor, seed)
    rows = []
    for criterion in asked:
        alone = criteria.model_copy(update={"criteria": (criterion,), "relative": None})
        at_margin, _ = simulation.run(shift_to_margin(evidence, criterion), alone)
        as_measured, looks = simulation.run(evidence, alone)
        rows.append(_row(criterion.name, at_margin, as_measured, looks))
    whole, looks = simulation.run(evidence, criteria.model_copy(update={"criteria": asked}))
    return [*rows, _row("all", None, whole, looks)]


def _row(
    name: str,
    at_margin: Counter[Outcome] | None,
    as_measured: Counter[Outcome],
    looks: float,
) -> PowerRow:
    def share(outcomes: Counter[Outcome], outcome: Outcome) -> float:
        return outcomes[outcome] / outcomes.total()

    return PowerRow(
        criterion=name,
        false_pass=None if at_margin is None else share(at_margin, "pass"),
        false_fail=None if at_margin is None else share(at_margin, "fail"),
        passes=share(as_measured, "pass"),
        fails=share(as_measured, "fail"),
        mean_looks=looks,
    )


def shift_to_margin(evidence: Evidence, criterion: Criterion) -> Evidence:
    """Evidence whose estimate of the criterion's metric is exactly its margin."""
    margin, tokens = criterion.margin, evidence.tokens
    match criterion.metric:
        case "perplexity_ratio":
            target = evidence.nll_reference.sum() + math.log(margin) * tokens.sum()
            shift = _spread(target - evidence.nll_candidate.sum(), tokens)
            return replace(evidence, nll_candidate=evidence.nll_candidate + shift)
        case "mean_kl":
            shift = _spread(margin * tokens.sum() - evidence.kl.sum(), tokens)
            return replace(evidence, kl=evidence.kl + shift)
        case "top1_agreement":
            shift = _spread(margin * tokens.sum() - evidence.agreements.sum(), tokens)
            return replace(evidence, agreements=evidence.agreements + shift)
        case "cloze_accuracy_drop":
            target = evidence.reference_correct.sum() - margin * evidence.items.sum()
            shift = _spread(target - evidence.candidate_correct.sum(), evidence.items)
            return replace(evidence, candidate_correct=evidence.candidate_correct + shift)
        case "p99_kl":
            share = np.quantile(evidence.token_kl, 0.99, method="higher")
            return replace(evidence, token_kl=evidence.token_kl * np.float32(margin / share))
        case "task_accuracy_drop" | "kv_mean_kl" | "kv_recall_drop":
            raise AssertionError("tasks and caches have no units to simulate from")


def _spread(total: float, weights: Floats) -> Floats:
    return weights * (total / float(weights.sum()))


class _Simulation:
    def __init__(
        self,
        evidence: Evidence,
        num_gates: int,
        num_resamples: int,
        noise_floor: float | None,
        seed: int,
    ) -> None:
        self._num_gates = num_gates
        self._num_units = len(evidence.names)
        self._num_resamples = num_resamples
        self._noise_floor = noise_floor
        self._seed = seed

    def run(self, evidence: Evidence, criteria: Criteria) -> tuple[Counter[Outcome], float]:
        """Outcomes of the simulated gates, and the mean number of looks."""
        rng = np.random.default_rng(self._seed)
        plan = plan_looks(self._num_units, criteria.looks)
        # The resamples do not depend on the data: one set serves every simulated gate.
        counts = [resample_counts(n, self._num_resamples, self._seed + n) for n in plan]
        outcomes: Counter[Outcome] = Counter()
        num_looks = 0
        for _ in range(self._num_gates):
            drawn = rng.integers(0, self._num_units, size=self._num_units)
            outcome, looks = self._gate(evidence, drawn, criteria, plan, counts)
            outcomes[outcome] += 1
            num_looks += looks
        return outcomes, num_looks / self._num_gates

    def _gate(
        self,
        evidence: Evidence,
        drawn: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        criteria: Criteria,
        plan: list[int],
        counts: list[Floats],
    ) -> tuple[Outcome, int]:
        alphas = alpha_spending([n / plan[-1] for n in plan], 1 - criteria.confidence)
        outcome: Outcome = "inconclusive"
        for look, (num_units, alpha) in enumerate(zip(plan, alphas, strict=True), start=1):
            results = judge_look(
                evidence.take(drawn[:num_units]),
                criteria,
                LookLevels(alpha, alphas[-1], plan[-1]),
                tasks={},
                noise_floor=self._noise_floor,
                counts=counts[look - 1],
            )
            outcome = judge_all([result.outcome for result in results])
            if outcome != "inconclusive":
                return outcome, look
        return outcome, len(plan)
