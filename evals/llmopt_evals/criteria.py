"""What must hold of a candidate, as data; and how an interval is judged against a margin.

The final verdict is an intersection-union test: it passes only if every criterion passes, so a bad
model has to deceive every criterion it violates and the chance of a false pass is at most that of
one criterion. Passing needs no correction for the number of criteria.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from llmopt_evals.errors import EvaluationError
from llmopt_evals.statistics import Interval

Outcome = Literal["pass", "fail", "inconclusive"]
Direction = Literal["lower", "higher"]
Metric = Literal[
    "perplexity_ratio",
    "mean_kl",
    "p99_kl",
    "top1_agreement",
    "cloze_accuracy_drop",
    "task_accuracy_drop",
    "kv_mean_kl",
    "kv_recall_drop",
]

BETTER: dict[Metric, Direction] = {
    "perplexity_ratio": "lower",
    "mean_kl": "lower",
    "p99_kl": "lower",
    "top1_agreement": "higher",
    "cloze_accuracy_drop": "lower",
    "task_accuracy_drop": "lower",
    "kv_mean_kl": "lower",
    "kv_recall_drop": "lower",
}
"""Which way each metric is better."""

CACHE_METRICS: tuple[Metric, ...] = ("kv_mean_kl", "kv_recall_drop")
"""Of a quantized cache: judged on long contexts, not on the units."""


class Criterion(BaseModel):
    """One metric and the value that its whole interval must stay on the good side of.

    Attributes:
        metric: what is measured.
        margin: in the metric's own unit (ratio, nats a token, share, difference of shares).
        better: which way is better; may be left out, and is refused if it contradicts the metric.
        task: the lm-eval task, for ``task_accuracy_drop`` only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: Metric
    margin: float = Field(allow_inf_nan=False)
    better: Direction | None = None
    task: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Criterion:
        if self.better is not None and self.better != BETTER[self.metric]:
            raise ValueError(f"{self.metric} is better when {BETTER[self.metric]}")
        if self.metric == "perplexity_ratio" and self.margin <= 0:
            raise ValueError("a ratio of perplexities is positive")
        if (self.task is not None) != (self.metric == "task_accuracy_drop"):
            raise ValueError("a task is named for task_accuracy_drop, and only there")
        return self

    @property
    def name(self) -> str:
        """The metric, with the task if there is one."""
        return self.metric if self.task is None else f"{self.metric}:{self.task}"


class RelativeCriterion(BaseModel):
    """The candidate's mean KL against plain rounding's in the same scheme.

    Attributes:
        allowed_ratio: candidate's KL over plain rounding's that is still accepted.
        noise_multiple: or else the KL lies below this multiple of the measured noise floor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    noise_multiple: float = Field(default=2.0, ge=0, allow_inf_nan=False)


class Criteria(BaseModel):
    """All that a candidate must satisfy.

    Attributes:
        criteria: each must pass.
        relative: the criterion relative to plain rounding, judged where a baseline is given.
        confidence: of the two-sided intervals over all looks; each side is a test at half of
            one minus it.
        looks: planned looks at growing samples; the last is at all units.
        power: that the reported sample sizes aim at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    criteria: tuple[Criterion, ...] = Field(min_length=1)
    relative: RelativeCriterion | None = RelativeCriterion()
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    looks: int = Field(default=3, ge=1, le=4)
    power: float = Field(default=0.9, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Criteria:
        names = [criterion.name for criterion in self.criteria]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"given twice: {', '.join(sorted(twice))}")
        return self


def parse_criteria(data: Mapping[str, JsonValue]) -> Criteria:
    """Criteria from a recipe's mapping.

    Raises:
        EvaluationError: an unknown key or metric (the closest known one is named), a wrong value.
    """
    try:
        return Criteria.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "criteria"
        known: list[str] = sorted(
            {*Criteria.model_fields, *Criterion.model_fields, *RelativeCriterion.model_fields}
        )
        wrong = str(first["loc"][-1]) if first["loc"] else ""
        if first["loc"] and first["loc"][-1] == "metric":
            known, wrong = sorted(BETTER), str(first["input"])
        close = difflib.get_close_matches(wrong, known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise EvaluationError(f"criteria: {where}: {first['msg']}", remedy) from error


def default_criteria(bits: int) -> Criteria:
    """The margins fixed for a bit width in ``margins.yaml``.

    Raises:
        EvaluationError: there are none for this width.
    """
    margins: dict[int, list[dict[str, JsonValue]]] = _margins()["bits"]
    if bits not in margins:
        raise EvaluationError(
            f"no margins are fixed for {bits} bits",
            f"write the criteria out in the recipe (margins exist for {sorted(margins)} bits)",
        )
    return parse_criteria({"criteria": list(margins[bits])})


def cache_criteria(kind: str) -> tuple[Criterion, ...]:
    """The margins fixed for a kind of quantized cache in ``margins.yaml``.

    Raises:
        EvaluationError: there are none for this kind.
    """
    margins = _margins()["kv_cache"]
    if kind not in margins:
        raise EvaluationError(
            f"no margins are fixed for a cache of kind {kind}",
            f"choose one of {', '.join(margins)}",
        )
    return tuple(Criterion.model_validate(data) for data in margins[kind])


def _margins() -> dict[str, Any]:
    text = resources.files("llmopt_evals").joinpath("margins.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def judge(interval: Interval, margin: float, better: Direction) -> Outcome:
    """Pass when the whole interval is inside the margin, fail when it is outside. Unrounded."""
    low, high = interval.low, interval.high
    if better == "higher":
        low, high, margin = -high, -low, -margin
    if high <= margin:
        return "pass"
    return "fail" if low > margin else "inconclusive"


def judge_either(outcomes: Sequence[Outcome]) -> Outcome:
    """A union: one pass is enough, and it fails only if all fail."""
    if "pass" in outcomes:
        return "pass"
    return "fail" if all(outcome == "fail" for outcome in outcomes) else "inconclusive"


def judge_all(outcomes: Sequence[Outcome]) -> Outcome:
    """An intersection: all must pass, and one failure is failure."""
    if "fail" in outcomes:
        return "fail"
    return "pass" if all(outcome == "pass" for outcome in outcomes) else "inconclusive"
