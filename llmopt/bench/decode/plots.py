"""The plots of the decode benchmark's page, from plain numbers to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmopt.report.svg import BAD, CARD, GOOD, INK, MUTED, OURS, PLAIN, UNSURE, drawing, to_svg

COLOURS = (OURS, PLAIN, GOOD, BAD, UNSURE, INK)
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5))
"""Once the colours are used up, they come again with other dashes."""

_LABEL_INCHES = 0.068
"""Of a character of a bar's label: what a browser's sans serif takes at this size, and a little."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line by batch.

    Attributes:
        label: of the legend.
        values: by batch.
        spreads: 20th and 80th percentile by batch, where there are any.
        is_floor: what memory allows; drawn thin and grey.
    """

    label: str
    values: dict[int, float]
    spreads: dict[int, tuple[float, float]]
    is_floor: bool = False


def colour_of(index: int) -> str:
    """Of a series by its place among those that are no floor."""
    return COLOURS[index % len(COLOURS)]


def batch_plot(
    name: str, title: str, unit: str, series: Sequence[Series], even_at: float | None = None
) -> Markup:
    """Lines over batches that stand at equal distances, on a logarithmic scale of values.

    Args:
        name: unique on the page.
        title: what a screen reader announces.
        unit: of the values.
        series: at least one, with at least one value.
        even_at: a value to draw a line at.
    """
    batches = sorted({batch for line in series for batch in line.values})
    places = {batch: place for place, batch in enumerate(batches)}
    with drawing(5.6, 3.1) as (figure, axes):
        if even_at is not None:
            axes.axhline(even_at, color=INK, lw=1.2)
        index = 0
        for line in series:
            xs = [places[batch] for batch in sorted(line.values)]
            ys = [line.values[batch] for batch in sorted(line.values)]
            if line.is_floor:
                axes.plot(xs, ys, color=MUTED, lw=1, dashes=(2, 2), marker="_", ms=8)
                continue
            colour = colour_of(index)
            dashes = DASHES[index // len(COLOURS) % len(DASHES)]
            (drawn,) = axes.plot(xs, ys, color=colour, lw=1.6, marker="o", ms=5, mec=CARD)
            if dashes:
                drawn.set_dashes(dashes)
            for batch, (low, high) in line.spreads.items():
                place = places[batch]
                axes.plot([place, place], [low, high], color=colour, lw=4, alpha=0.35)
            index += 1
        values = [value for line in series for value in line.values.values()]
        values += [] if even_at is None else [even_at]
        axes.set_yscale("log")
        bounds = min(values) / 1.25, max(values) * 1.25
        axes.set_ylim(*bounds)
        _plain_ticks(axes, bounds)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set_xlim(-0.25, len(batches) - 0.75)
        axes.set(xlabel="requests at once", ylabel=unit)
        told = "; ".join(_told(line) for line in series if not line.is_floor)
        return to_svg(figure, name, title, told)


def bar_plot(name: str, title: str, unit: str, bars: Sequence[tuple[str, float]]) -> Markup:
    """Horizontal bars; llmopt's are coloured as ours."""
    left = 0.2 + _LABEL_INCHES * max(len(label) for label, _ in bars)
    with drawing(5.6, 0.42 * len(bars) + 0.65, left=left) as (figure, axes):
        colours = [OURS if label.startswith("llmopt") else PLAIN for label, _ in bars]
        axes.barh(range(len(bars)), [value for _, value in bars], 0.62, color=colours)
        for place, (_, value) in enumerate(bars):
            axes.annotate(
                f"{value:.1f}",
                (value, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=10.5,
            )
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.set(ylim=(len(bars) - 0.5, -0.5), xlabel=unit)
        axes.set_xlim(0, 1.15 * max(value for _, value in bars))
        axes.grid(visible=False, axis="y")
        told = "; ".join(f"{label}: {value:.1f}" for label, value in bars)
        return to_svg(figure, name, title, told)


def _told(line: Series) -> str:
    values = ", ".join(f"{value:.3g} at {batch}" for batch, value in sorted(line.values.items()))
    return f"{line.label}: {values}"


def _plain_ticks(axes: object, bounds: tuple[float, float]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    assert isinstance(axes, Axes)
    decades = math.log10(bounds[1] / bounds[0])
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
