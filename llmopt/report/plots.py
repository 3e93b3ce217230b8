"""The page's plots, each from plain numbers to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from llmopt.report.svg import (
    BAD,
    CARD,
    GOOD,
    INK,
    MUTED,
    OURS,
    PLAIN,
    UNSURE,
    ZONE,
    drawing,
    to_svg,
)
from llmopt.report.wording import limit as wording_limit
from llmopt.report.wording import number, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTCOME_COLOURS = {"pass": GOOD, "fail": BAD, "inconclusive": UNSURE}
_BEYOND = 2.0  # how many margins the interval plot shows; further ones become arrows


@dataclass(frozen=True, slots=True)
class Interval:
    """One criterion, scaled: 0 is the source itself, 1 the margin; larger is worse."""

    label: str
    value: str
    estimate: float
    low: float
    high: float
    outcome: str


@dataclass(frozen=True, slots=True)
class KindErrors:
    """Errors of one kind of linear layer along the blocks; NaN where there is none."""

    kind: str
    blocks: tuple[int, ...]
    ours: tuple[float, ...]
    plain: tuple[float, ...]


def interval_plot(intervals: Sequence[Interval]) -> Markup:
    """Every criterion's estimate and interval against its margin, margins lined up at 1."""
    rows = len(intervals)
    left = min(0.0, *(_clipped(item.low) for item in intervals)) - 0.06
    right = max(1.3, *(min(item.high, _BEYOND) for item in intervals)) + 0.12
    with drawing(5.6, 0.62 * rows + 0.6, left=0.05) as (figure, axes):
        axes.axvspan(left, 1, color=ZONE, lw=0, zorder=0)
        axes.axvline(1, color=INK, lw=1.3)
        for row, item in enumerate(intervals):
            _draw_interval(axes, row, item, left)
        axes.set(xlim=(left, right), ylim=(rows - 0.55, -0.75), yticks=[])
        axes.set_xticks([0, 1], ["no loss", "margin"])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        return to_svg(
            figure,
            "intervals",
            "Each criterion against its margin",
            "Dots are estimates, bars confidence intervals, scaled so that all margins coincide. "
            + "; ".join(f"{item.label}: {item.value}, {item.outcome}" for item in intervals),
        )


def _draw_interval(axes: Axes, row: int, item: Interval, left: float) -> None:
    colour = OUTCOME_COLOURS.get(item.outcome, MUTED)
    low, high, middle = (_clipped(value) for value in (item.low, item.high, item.estimate))
    axes.plot([0, 0], [row - 0.17, row + 0.3], color=MUTED, lw=1, dashes=(2, 2))
    axes.plot([low, high], [row, row], color=colour, lw=5, alpha=0.4, solid_capstyle="round")
    if item.estimate > _BEYOND or not math.isfinite(item.estimate):
        axes.plot(middle, row, marker=">", ms=9, color=colour, mec=CARD, mew=1.2, ls="none")
    else:
        axes.plot(middle, row, marker="o", ms=8.5, color=colour, mec=CARD, mew=1.2, ls="none")
    axes.text(left + 0.015, row - 0.36, shortened(item.label, 44), fontsize=11, va="center")
    axes.annotate(
        item.value,
        (1, row - 0.36),
        xycoords=("axes fraction", "data"),
        fontsize=10.5,
        ha="right",
        va="center",
        color=colour,
    )


def _clipped(value: float) -> float:
    return value if math.isfinite(value) and value < _BEYOND else _BEYOND


def kind_plot(errors: KindErrors, index: int, bounds: tuple[float, float], ours: str) -> Markup:
    """Error by block for one kind of linear layer, ours against plain rounding.

    Args:
        errors: the kind's errors.
        index: its place on the page, for identifiers.
        bounds: common limits of the error axis, so that panels compare.
        ours: the solver's name.
    """
    has_plain = any(math.isfinite(value) for value in errors.plain)
    many = len(errors.blocks) > 24  # markers would hide the lines
    ms, lw = (0.0, 1.2) if many else (4.5, 1.4)
    with drawing(2.75, 1.95, left=0.47, top=0.27) as (figure, axes):
        if has_plain:
            axes.plot(errors.blocks, errors.plain, color=PLAIN, marker="s", ms=ms, lw=lw)
            axes.fill_between(errors.blocks, errors.ours, errors.plain, color=OURS, alpha=0.1, lw=0)
        axes.plot(errors.blocks, errors.ours, color=OURS, marker="o", ms=ms, lw=lw)
        axes.set_yscale("log")
        axes.set_ylim(*bounds)
        _plain_log_axis(axes.yaxis, bounds)
        _block_axis(axes, errors.blocks)
        axes.set_title(shortened(errors.kind, 30), fontsize=10.5, color=INK, loc="left")
        axes.set_xlabel("block", fontsize=10)
        return to_svg(
            figure,
            f"kind-{index}",
            f"Error of {errors.kind} by block",
            f"{ours}: largest {number(_largest(errors.ours))}"
            + (f"; plain rounding: {number(_largest(errors.plain))}" if has_plain else ""),
        )


def _largest(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _block_axis(axes: Axes, blocks: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    pad = max(0.3, 0.02 * (max(blocks) - min(blocks)))
    axes.set_xlim(min(blocks) - pad, max(blocks) + pad)


def _plain_log_axis(axis: object, bounds: tuple[float, float]) -> None:
    from matplotlib.axis import Axis
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    assert isinstance(axis, Axis)
    decades = math.log10(bounds[1] / bounds[0])
    subs = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 2.6 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: _tick(value)))
    axis.set_minor_locator(NullLocator())


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-4 <= abs(value) < 1e5 or value == 0 else f"{value:.0e}"


def histogram_plot(
    edges: Sequence[float],
    counts: Sequence[float],
    marks: Sequence[tuple[str, float]],
) -> Markup:
    """KL divergence per token on a logarithmic axis.

    Args:
        edges: ``len(counts) + 1`` positive bin edges in nats.
        counts: tokens in each bin.
        marks: labelled values to draw a line at (mean, 99th percentile).
    """
    total = sum(counts)
    assert total > 0
    marked = [1.2 * value for _, value in marks if math.isfinite(value)]
    right = max(edges[_last_filled(counts) + 1], *marked, 0.0)
    bounds = (edges[_first_beyond(counts, 0.002 * total)], right)
    shares = [100 * value / total for value in counts]
    with drawing(5.6, 2.9) as (figure, axes):
        widths = [high - low for low, high in zip(edges, edges[1:], strict=False)]
        axes.bar(edges[:-1], shares, widths, align="edge", color=OURS, ec=CARD, lw=0.5)
        axes.set_xscale("log")
        top = max(shares) * (1.06 + 0.13 * len(marks))
        for place, (label, value) in enumerate(marks):
            if not (math.isfinite(value) and value > 0):
                continue
            height = top * (1 - 0.105 * place)
            axes.plot([value, value], [0, height], color=INK, lw=1.2, dashes=(4, 2))
            leftward = value > math.sqrt(bounds[0] * bounds[1])
            axes.annotate(
                f"{label} {number(value)}",
                (value, height),
                (-5 if leftward else 5, 0),
                textcoords="offset points",
                ha="right" if leftward else "left",
                va="top",
                fontsize=10.5,
                bbox={"fc": CARD, "ec": "none", "pad": 1.5},
            )
        axes.set(ylim=(0, top), xlim=bounds, xlabel="KL divergence of a token, nats")
        axes.set_ylabel("% of tokens")
        _plain_log_axis(axes.xaxis, bounds)
        axes.grid(visible=False, axis="x")
        described = ", ".join(f"{label} {number(value)}" for label, value in marks)
        return to_svg(figure, "kl-histogram", "KL divergence per token", described)


def _first_beyond(counts: Sequence[float], sum_before: float) -> int:
    """The first bin at which the running sum passes ``sum_before``: the far left is left out."""
    running = 0.0
    for index, value in enumerate(counts):
        running += value
        if running > sum_before:
            return index
    return 0


def _last_filled(counts: Sequence[float]) -> int:
    return max(index for index, value in enumerate(counts) if value > 0)


def position_plot(positions: Sequence[float], values: Sequence[float]) -> Markup:
    """Mean KL divergence by position in the block of text."""
    with drawing(5.6, 2.6) as (figure, axes):
        axes.plot(positions, values, color=OURS, marker="o", ms=4.5, lw=1.6)
        axes.set(xlabel="position in the text, tokens", ylabel="mean KL, nats")
        axes.set_ylim(0, 1.15 * max((value for value in values if math.isfinite(value)), default=1))
        axes.set_xlim(0, max(positions) * 1.02)
        return to_svg(
            figure,
            "kl-position",
            "KL divergence by position",
            f"From {number(values[0])} at the start to {number(values[-1])} at the end.",
        )


def unit_plot(ratios: Sequence[float], limit: float | None) -> Markup:
    """Perplexity ratio of every held-out document, sorted; 1 is the source."""
    ordered = sorted(value for value in ratios if math.isfinite(value))
    ranks = [100 * (rank + 0.5) / len(ordered) for rank in range(len(ordered))]
    with drawing(5.6, 2.6) as (figure, axes):
        axes.axhline(1, color=MUTED, lw=1, dashes=(2, 2))
        top = max(ordered, default=1.0)
        if limit is not None and limit < 1 + 2.5 * (top - 1):
            axes.axhline(limit, color=INK, lw=1.2)
            axes.annotate(
                f"margin {wording_limit(limit)}",
                (0, limit),
                (4, 4),
                textcoords="offset points",
                fontsize=10.5,
            )
        size = 5.0 if len(ordered) < 150 else 2.5
        axes.plot(ranks, ordered, color=OURS, marker="o", ms=size, ls="none", alpha=0.75)
        axes.set(xlim=(0, 100), xlabel="documents, % (sorted)", ylabel="perplexity ratio")
        better = sum(value < 1 for value in ordered)
        return to_svg(
            figure,
            "unit-ratios",
            "Perplexity ratio per document",
            f"{len(ordered)} documents, {better} of them better than the source, "
            f"the worst {number(top)}.",
        )
