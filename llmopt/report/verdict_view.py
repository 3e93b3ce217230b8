"""The verdict in words and in plain numbers; the only file here that knows its fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmopt.report.plots import Interval
from llmopt.report.wording import count, limit, number, percent, plural
from llmopt_evals.verdict import CriterionResult, Verdict

SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
HEADLINES = {"pass": "Passed", "fail": "Refused", "inconclusive": "Inconclusive"}

_LABELS = {
    "perplexity_ratio": "Perplexity ratio",
    "mean_kl": "Mean KL divergence",
    "p99_kl": "KL divergence, 99th percentile",
    "top1_agreement": "Top-1 agreement",
    "cloze_accuracy_drop": "Cloze accuracy lost",
    "task_accuracy_drop": "Accuracy lost",
    "kl_above_baseline": "KL above plain rounding's",
    "kv_mean_kl": "Mean KL from a 16-bit cache, long contexts",
    "kv_recall_drop": "Recall of key-value pairs lost",
}
_LOSSLESS = {"perplexity_ratio": 1.0, "top1_agreement": 1.0}  # of other metrics it is 0


@dataclass(frozen=True, slots=True)
class CriterionRow:
    """One criterion as the tables show it; ``lossless`` is what the source itself would score."""

    label: str
    estimate: float
    low: float
    high: float
    bound: Literal["≤", "≥"]
    margin: float
    lossless: float
    units_for_power: int | None
    outcome: str

    def scaled(self, value: float) -> float:
        """``value`` on the scale where the source lies at 0 and the margin at 1."""
        width = self.margin - self.lossless
        if width == 0:
            return 0.0 if value == self.lossless else math.inf
        return (value - self.lossless) / width


def criterion_rows(verdict: Verdict) -> list[CriterionRow]:
    """The criteria in the verdict's order."""
    return [_row(item, verdict) for item in verdict.criteria]


def _row(item: CriterionResult, verdict: Verdict) -> CriterionRow:
    metric, _, task = item.name.partition(":")
    label = _LABELS.get(metric, metric.replace("_", " ").capitalize())
    estimate, low, high, margin = item.estimate, item.low, item.high, item.margin
    lossless = _LOSSLESS.get(metric, 0.0)
    if item.noise_bound is not None and item.noise_bound.outcome == "pass" and high > margin:
        label, noise = "Mean KL against the noise floor", item.noise_bound
        estimate, low, high, margin = noise.estimate, noise.low, noise.high, noise.bound
    elif metric == "kl_above_baseline" and verdict.summary.baseline_mean_kl is not None:
        relative = verdict.criteria_asked.relative
        allowed = 1.0 if relative is None else relative.allowed_ratio
        lossless = -allowed * verdict.summary.baseline_mean_kl
    return CriterionRow(
        label=f"{label}, {task}" if task else label,
        estimate=estimate,
        low=low,
        high=high,
        bound="≤" if item.better == "lower" else "≥",
        margin=margin,
        lossless=lossless,
        units_for_power=item.units_for_power,
        outcome=item.outcome,
    )


def sentence(verdict: Verdict) -> str:
    """Why the verdict is what it is, naming the criterion furthest off."""
    rows = criterion_rows(verdict)
    if verdict.outcome == "pass":
        return f"All {len(rows)} criteria hold: each whole interval lies inside its margin."
    decisive = [row for row in rows if row.outcome == verdict.outcome]
    first = max(decisive, key=_distance)
    interval = f"{number(first.low)} to {number(first.high)}"
    bound = f"{'at most' if first.bound == '≤' else 'at least'} {limit(first.margin)}"
    of = f"{len(decisive)} of {len(rows)} criteria"
    if verdict.outcome == "fail":
        return (
            f"{first.label}: {number(first.estimate)} ({interval}), where {bound} is allowed. "
            f"{of} {'fails' if len(decisive) == 1 else 'fail'}."
        )
    return (
        f"{first.label}: the interval {interval} crosses the margin ({bound}). {of} "
        f"{'is' if len(decisive) == 1 else 'are'} undecided on {plural(verdict.num_units, 'unit')}"
        f"{_wanted(decisive)}."
    )


def _wanted(undecided: list[CriterionRow]) -> str:
    """How much text would settle it, where some amount would."""
    wanted = [row.units_for_power for row in undecided]
    known = [units for units in wanted if units is not None]
    if not known or len(known) < len(wanted):
        return "; at the effect measured, more text would hardly make it pass"
    return f"; about {count(max(known))} would settle it if the estimates stay where they are"


def _distance(row: CriterionRow) -> float:
    distance = row.scaled(row.estimate)
    return math.inf if math.isnan(distance) else distance


def intervals(verdict: Verdict) -> list[Interval]:
    """The criteria on one scale: the source at 0, every margin at 1."""
    scaled = []
    for row in criterion_rows(verdict):
        low, high = sorted((row.scaled(row.low), row.scaled(row.high)))
        estimate = row.scaled(row.estimate)
        value = number(row.estimate)
        scaled.append(Interval(row.label, value, estimate, low, high, row.outcome))
    return scaled


def basis(verdict: Verdict) -> str:
    """On how much the verdict stands."""
    parts = [f"{count(verdict.num_tokens)} tokens in {plural(verdict.num_units, 'unit')}"]
    if verdict.num_items:
        parts.append(plural(verdict.num_items, "cloze item"))
    looks = f"{len(verdict.looks)} of {plural(verdict.num_planned_looks, 'planned look')}"
    parts.append(looks)
    if verdict.criteria:
        parts.append(f"{percent(min(item.confidence for item in verdict.criteria))} intervals")
    if verdict.noise_floor is not None:
        parts.append(f"noise floor {number(verdict.noise_floor.mean_kl)} nats")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Tile:
    """A key number with a line below it."""

    label: str
    value: str
    note: str


def tiles(verdict: Verdict) -> list[Tile]:
    """The three numbers to remember: perplexity, divergence, agreement."""
    levels = verdict.summary
    rows = {item.name: item for item in verdict.criteria}
    chosen = [
        Tile(
            "Perplexity",
            f"× {number(levels.candidate_perplexity / levels.reference_perplexity)}",
            f"{number(levels.reference_perplexity)} → {number(levels.candidate_perplexity)}",
        )
    ]
    if (kl := rows.get("mean_kl")) is not None:
        plain = levels.baseline_mean_kl
        note = "nats a token" + ("" if plain is None else f"; plain rounding {number(plain)}")
        chosen.append(Tile("Mean KL divergence", number(kl.estimate), note))
    if (top := rows.get("top1_agreement")) is not None:
        chosen.append(Tile("Same top token", percent(top.estimate), "of tokens, as the source's"))
    return chosen


@dataclass(frozen=True, slots=True)
class Comparison:
    """One level of source and artifact."""

    label: str
    source: float
    artifact: float
    is_share: bool


def comparisons(verdict: Verdict) -> list[Comparison]:
    """Levels of which the criteria judge the differences."""
    levels = verdict.summary
    found = [
        Comparison(
            "Perplexity (lower is better)",
            levels.reference_perplexity,
            levels.candidate_perplexity,
            is_share=False,
        )
    ]
    ours, source = levels.candidate_cloze_accuracy, levels.reference_cloze_accuracy
    if ours is not None and source is not None:
        found.append(Comparison("Cloze accuracy (higher is better)", source, ours, is_share=True))
    return found


@dataclass(frozen=True, slots=True)
class RecallRow:
    """Recall at one length of passage: ``(source, artifact)`` over all, and by quarter of it.

    The first quarter is the farthest from the question.
    """

    num_tokens: int
    accuracy: tuple[float, float]
    depths: tuple[tuple[float, float], ...]
    is_informative: bool


def recall_rows(verdict: Verdict) -> list[RecallRow]:
    """By length; empty without a quantized cache."""
    if verdict.kv_cache is None:
        return []
    return [
        RecallRow(
            num_tokens=length.num_tokens,
            accuracy=(length.source_accuracy, length.candidate_accuracy),
            depths=tuple((c.source_accuracy, c.candidate_accuracy) for c in length.depths),
            is_informative=length.is_informative,
        )
        for length in verdict.kv_cache.recall
    ]


def recall_sentence(verdict: Verdict) -> str:
    """What the table of recall says, and whether it was judged at all."""
    rows = recall_rows(verdict)
    judged = [row for row in rows if row.is_informative]
    if not judged:
        return (
            "Not informative: the source itself recalls next to nothing, so recall was not judged "
            "and counts neither for nor against the cache."
        )
    if len(judged) < len(rows):
        return "Lengths at which the source itself is near chance are not judged."
    return "Judged at every length."


def kl_marks(verdict: Verdict) -> list[tuple[str, float]]:
    """Where the histogram of KL per token draws a line."""
    rows = {item.name: item.estimate for item in verdict.criteria}
    named = (("mean", rows.get("mean_kl")), ("p99", verdict.plots.kl_quantiles.get("0.99")))
    return [(label, value) for label, value in named if value is not None]


def ratio_margin(verdict: Verdict) -> float | None:
    """The margin on the perplexity ratio, if there is one."""
    margins = [item.margin for item in verdict.criteria if item.name == "perplexity_ratio"]
    return margins[0] if margins else None
