"""The goals on an H200, as data, and whether a run met them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benchmarks.benchmark import OURS

if TYPE_CHECKING:
    from benchmarks.rows import Row

Outcome = Literal["met", "missed", "unmeasured"]
SET_FOR = "NVIDIA H200"


@dataclass(frozen=True, slots=True)
class Reference:
    """Names a row: operation, problem and implementation."""

    operation: str
    benchmark: str
    implementation: str = OURS


@dataclass(frozen=True, slots=True)
class Goal:
    """At least ``target``.

    Attributes:
        metric: in words.
        target: times as fast, or share of the ceiling.
        row: ours.
        over: the row whose time is divided by ours; none compares ours with the ceiling.
    """

    metric: str
    target: float
    row: Reference
    over: Reference | None = None

    def references(self) -> tuple[Reference, ...]:
        """The rows that it rests on."""
        return (self.row,) if self.over is None else (self.row, self.over)


@dataclass(frozen=True, slots=True)
class GoalResult:
    """What a run found; ``reason`` where it found nothing."""

    metric: str
    target: float
    found: float | None
    outcome: Outcome
    reason: str = ""


PREFILL = ("attention_prefill", "causal head 128, 8192 tokens")
DECODE = "attention_decode"
DECODE_CASES = {kind: f"{kind}, 64 x 8192 tokens" for kind in ("bf16", "fp8", "int8", "int4")}
W4A16 = "linear_w4a16"
W4A16_CASES = {batch: f"28672 x 4096, batch {batch}" for batch in (1, 64)}
FP8 = "linear_fp8"
FP8_CASES = {
    words: f"{words}, 8192 x 8192 x 8192"
    for words in ("tensor scales", "token scales", "token scales, fast sums")
}
GPTQ = ("gptq_columns", "4096 rows, 128 columns")

SDPA_FLASH, SDPA_CUDNN, SDPA_EFFICIENT = "SDPA flash", "SDPA cuDNN", "SDPA efficient"
CUBLAS = "cuBLAS bf16"
SCALED_MM = "torch._scaled_mm"
TORCH_LOOP = "the same loop in torch"

GOALS: tuple[Goal, ...] = (
    Goal("prefill over SDPA flash", 1.0, Reference(*PREFILL), Reference(*PREFILL, SDPA_FLASH)),
    Goal("prefill over SDPA cuDNN", 0.75, Reference(*PREFILL), Reference(*PREFILL, SDPA_CUDNN)),
    Goal("decode, share of copy bandwidth", 0.85, Reference(DECODE, DECODE_CASES["bf16"])),
    *(
        Goal(
            f"decode, {kind} KV over bf16 KV",
            1.8,
            Reference(DECODE, DECODE_CASES[kind]),
            Reference(DECODE, DECODE_CASES["bf16"]),
        )
        for kind in ("int8", "fp8")
    ),
    Goal("W4A16 batch 1, share of copy bandwidth", 0.75, Reference(W4A16, W4A16_CASES[1])),
    *(
        Goal(
            f"W4A16 batch {batch} over cuBLAS bf16",
            target,
            Reference(W4A16, W4A16_CASES[batch]),
            Reference(W4A16, W4A16_CASES[batch], CUBLAS),
        )
        for batch, target in ((1, 3.0), (64, 1.0))
    ),
    *(
        Goal(
            f"fp8 product, {words}, over _scaled_mm",
            0.9,
            Reference(FP8, case),
            Reference(FP8, case, SCALED_MM),
        )
        for words, case in FP8_CASES.items()
    ),
    Goal("gptq_columns over torch", 20.0, Reference(*GPTQ), Reference(*GPTQ, TORCH_LOOP)),
)


def evaluate(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> tuple[GoalResult, ...]:
    """Every goal: met, missed, or unmeasured with the reason."""
    found = {Reference(row.operation, row.benchmark, row.implementation): row for row in rows}
    return tuple(_evaluate(goal, found) for goal in goals)


def _evaluate(goal: Goal, rows: dict[Reference, Row]) -> GoalResult:
    for reference in goal.references():
        row = rows.get(reference)
        name = f"{reference.operation}/{reference.benchmark}, {reference.implementation}"
        if row is None:
            return _unmeasured(goal, f"no row {name}")
        if row.status != "measured" or row.p50_ms is None:
            return _unmeasured(goal, f"{name}: {row.status}: {row.reason}")
    ours = rows[goal.row]
    if goal.over is None:
        value = ours.fraction_of_ceiling
        if value is None:
            return _unmeasured(goal, "its ceiling was not measured")
    else:
        other = rows[goal.over].p50_ms
        assert other is not None and ours.p50_ms is not None
        value = other / ours.p50_ms
    return GoalResult(goal.metric, goal.target, value, "met" if value >= goal.target else "missed")


def _unmeasured(goal: Goal, reason: str) -> GoalResult:
    return GoalResult(goal.metric, goal.target, None, "unmeasured", reason)
