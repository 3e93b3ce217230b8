"""The verdict: what was decided, on what numbers, and what a reader would want to plot."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmopt_evals.criteria import Criteria, Direction, Outcome


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NoiseBound(_Record):
    """The second way to satisfy the relative criterion: KL below a multiple of the noise floor."""

    estimate: float
    low: float
    high: float
    bound: float
    outcome: Outcome


class CriterionResult(_Record):
    """One criterion at one look.

    Attributes:
        name: the metric, with the task where there is one; ``kl_above_baseline`` if relative.
        better: which way is better.
        margin: what the whole interval must stay on the good side of.
        estimate: the point estimate.
        low: lower end of the interval.
        high: upper end of the interval.
        confidence: of this look's two-sided interval.
        outcome: of this criterion.
        power: probability that the last planned look passes, if the true effect is the estimate.
        units_for_power: units that give the wanted power for that effect; none if no number does.
        noise_bound: the relative criterion's other arm, where the noise was measured.
    """

    name: str
    better: Direction
    margin: float
    estimate: float
    low: float
    high: float
    confidence: float
    outcome: Outcome
    power: float
    units_for_power: int | None
    noise_bound: NoiseBound | None = None


class Look(_Record):
    """One look at the sample so far."""

    num_units: int
    num_tokens: int
    num_items: int
    alpha: float
    outcome: Outcome
    criteria: tuple[CriterionResult, ...]


class NoiseFloor(_Record):
    """The source against itself under another batch shape, nats a token."""

    mean_kl: float
    p99_kl: float
    num_tokens: int


class Summary(_Record):
    """Levels, of which the criteria judge the differences."""

    reference_perplexity: float
    candidate_perplexity: float
    reference_cloze_accuracy: float | None
    candidate_cloze_accuracy: float | None
    baseline_mean_kl: float | None


class UnitPoint(_Record):
    """One unit, for a plot."""

    name: str
    num_tokens: int
    perplexity_ratio: float
    mean_kl: float


class PositionBucket(_Record):
    """Mean KL of tokens predicted at block positions ``start`` to ``stop - 1``."""

    start: int
    stop: int
    num_tokens: int
    mean_kl: float


class PlotData(_Record):
    """KL per token as a histogram (log10 of nats; edges one more than counts) and quantiles."""

    kl_log10_edges: tuple[float, ...]
    kl_counts: tuple[int, ...]
    kl_quantiles: dict[str, float]
    units: tuple[UnitPoint, ...]
    positions: tuple[PositionBucket, ...]


class RecallCell(_Record):
    """Recall of the pairs in one quarter of a passage; ``depth`` 0 is the farthest from its end."""

    depth: int
    num_items: int
    source_accuracy: float
    candidate_accuracy: float


class RecallLength(_Record):
    """Recall at one length of passage.

    Attributes:
        num_tokens: of a passage.
        num_items: questions.
        source_accuracy: share of them that the source has right.
        candidate_accuracy: share of them that the candidate has right.
        is_informative: whether the source is so far above chance that losing it would show.
        depths: by quarter, the farthest first.
    """

    num_tokens: int
    num_items: int
    source_accuracy: float
    candidate_accuracy: float
    is_informative: bool
    depths: tuple[RecallCell, ...]


class CacheResult(_Record):
    """What was measured of a quantized cache besides the criteria.

    Attributes:
        label: the cache in words.
        num_context_tokens: of the long contexts.
        num_contexts: how many.
        positions: KL of the candidate with this cache from itself with a 16-bit cache, by position.
        chance: accuracy of a guess at the recall task.
        recall: by length of passage, longest last.
    """

    label: str
    num_context_tokens: int
    num_contexts: int
    positions: tuple[PositionBucket, ...]
    chance: float
    recall: tuple[RecallLength, ...]


class Verdict(_Record):
    """What the gate decided.

    Attributes:
        outcome: the last look's.
        criteria: the last look's results.
        looks: every look that was made.
        num_planned_looks: how many would have been made without an early decision.
        num_available_units: units at the last planned look.
        criteria_asked: what was asked, as data.
        notes: what a reader must know (sources joined, criteria not judged).
        kv_cache: what was measured of a quantized cache, if the candidate has one.
    """

    schema_version: Literal[1] = 1
    outcome: Outcome
    criteria: tuple[CriterionResult, ...]
    looks: tuple[Look, ...]
    num_planned_looks: int
    num_available_units: int
    num_units: int
    num_tokens: int
    num_items: int
    criteria_asked: Criteria
    summary: Summary
    noise_floor: NoiseFloor | None
    plots: PlotData
    notes: tuple[str, ...]
    seed: int
    kv_cache: CacheResult | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether an earlier look than the last planned one decided."""
        return len(self.looks) < self.num_planned_looks
