"""What the rows come to: where a setting stops paying, and how llmopt stands beside its peers.

A setting pays at a batch where its 20th percentile lies above the plain run's 80th, costs where its
80th lies below the plain run's 20th, and is even where the two overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmopt.bench.decode.engines import LLMOPT
from llmopt.bench.decode.rows import DecodeReport, DecodeRow
from llmopt.bench.decode.workloads import MIXED

PLAIN = "16-bit"
Effect = Literal["pays", "even", "costs"]


@dataclass(frozen=True, slots=True)
class Point:
    """A setting at one batch.

    Attributes:
        batch: requests.
        ratio: of median tokens a second, setting over plain.
        effect: whether that is more than the spread of both.
    """

    batch: int
    ratio: float
    effect: Effect


@dataclass(frozen=True, slots=True)
class Curve:
    """A setting against the same without it, at one context.

    Attributes:
        setting: what is switched on, as a sentence calls it.
        context: tokens of a prompt.
        points: by batch, ascending.
    """

    setting: str
    context: int
    points: tuple[Point, ...]


def break_even_curves(report: DecodeReport) -> list[Curve]:
    """Every setting of llmopt's engine that was measured beside the same without it."""
    ours = [row for row in report.measured if row.engine == LLMOPT and row.context is not None]
    by_place = {(row.weights, row.kv, row.context, row.batch): row for row in ours}
    curves: dict[tuple[str, int], list[Point]] = {}
    for row in ours:
        for setting, plain in _without(row):
            base = by_place.get((*plain, row.context, row.batch))
            if base is not None and row.context is not None:
                curves.setdefault((setting, row.context), []).append(_point(row, base))
    return [
        Curve(setting, context, tuple(sorted(points, key=lambda point: point.batch)))
        for (setting, context), points in curves.items()
    ]


def break_even_sentence(curve: Curve) -> str:
    """Above which batch the setting stops paying, where that is what was measured."""
    points = curve.points
    told = ", ".join(f"{point.ratio:.2f} x at batch {point.batch}" for point in points)
    costs = [point.effect == "costs" for point in points]
    place = f"at a context of {curve.context:,}"
    if not any(costs):
        pays = [point.effect == "pays" for point in points]
        verdict = "faster at every batch measured" if all(pays) else "slower at no batch measured"
        return f"{curve.setting} {place}: {verdict}: {told}"
    if all(costs):
        return f"do not enable {curve.setting} for speed {place}: {told}"
    first = costs.index(True)
    if all(costs[first:]):
        batch = points[first - 1].batch
        return f"do not enable {curve.setting} above batch {batch} {place}: {told}"
    last = len(costs) - costs[::-1].index(True)
    if all(costs[:last]):
        return f"do not enable {curve.setting} below batch {points[last].batch} {place}: {told}"
    return f"{curve.setting} {place}: slower at some batches and not at others: {told}"


def standings(report: DecodeReport) -> list[str]:
    """Llmopt with plain weights and cache: over its own batch 1, and beside transformers."""
    rows = report.measured
    plain = [row for row in rows if (row.weights, row.kv) == (PLAIN, PLAIN)]
    ours = [row for row in plain if row.engine == LLMOPT]
    theirs = [row for row in plain if row.engine == "transformers"]
    lines = []
    for single in (row for row in ours if row.batch == 1 and row.context is not None):
        same = [row for row in ours if row.context == single.context and row.batch > 1]
        if same:
            most = max(same, key=lambda row: row.batch)
            lines.append(
                f"llmopt at batch {most.batch} decodes {most.rate / single.rate:.2f} x the tokens "
                f"of batch 1 at a context of {single.context:,}"
            )
        peers = [row for row in theirs if row.workload == single.workload]
        if peers:
            best = max(peers, key=lambda row: row.rate)
            lines.append(
                f"llmopt at batch 1 decodes {single.rate / best.rate:.2f} x the tokens of "
                f"{best.name}, the fastest of transformers, at a context of {single.context:,}"
            )
    mixed = next((row for row in ours if row.workload == MIXED), None)
    if mixed is not None:
        lines += _mixed_lines(mixed, [row for row in theirs if row.workload == MIXED])
    return lines


def sentences(report: DecodeReport) -> list[str]:
    """All of it, a line each."""
    return [*map(break_even_sentence, break_even_curves(report)), *standings(report)]


def _mixed_lines(mixed: DecodeRow, peers: Sequence[DecodeRow]) -> list[str]:
    lines = []
    alone = [row for row in peers if row.variant == "sequential"]
    together = [row for row in peers if row.variant != "sequential"]
    if alone:
        lines.append(
            f"{mixed.batch} requests of mixed lengths: llmopt gives "
            f"{mixed.rate / alone[0].rate:.2f} x the tokens a second of sequential generate"
        )
    if together:
        best = max(together, key=lambda row: row.rate)
        way = "a left-padded batch" if best.variant == "dynamic" else "continuous batching"
        lines.append(
            f"{mixed.batch} requests of mixed lengths: llmopt gives "
            f"{mixed.rate / best.rate:.2f} x the tokens a second of {way} in transformers, the "
            f"better of {len(together)}"
        )
    return lines


def _without(row: DecodeRow) -> list[tuple[str, tuple[str, str]]]:
    """Each setting that a row has switched on, and weights and cache of the run without it."""
    found = []
    if row.weights != PLAIN:
        beside = "" if row.kv == PLAIN else f" (with an {row.kv} cache)"
        found.append((f"{row.weights} weights{beside}", (PLAIN, row.kv)))
    if row.kv != PLAIN:
        beside = "" if row.weights == PLAIN else f" (with {row.weights} weights)"
        found.append((f"the {row.kv} cache{beside}", (row.weights, PLAIN)))
    return found


def _point(row: DecodeRow, base: DecodeRow) -> Point:
    assert row.timing is not None and base.timing is not None
    ours, plain = row.timing.tokens_per_s, base.timing.tokens_per_s
    effect: Effect = "even"
    if ours.p20 > plain.p80:
        effect = "pays"
    elif ours.p80 < plain.p20:
        effect = "costs"
    return Point(row.batch, ours.p50 / plain.p50, effect)
