"""The decode benchmark as one self-contained page: plots, sentences, table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from llmopt.bench.decode.break_even import (
    PLAIN,
    break_even_curves,
    break_even_sentence,
    standings,
)
from llmopt.bench.decode.engines import LLMOPT
from llmopt.bench.decode.plots import Series, bar_plot, batch_plot, colour_of
from llmopt.bench.decode.rows import DecodeReport, DecodeRow
from llmopt.bench.decode.table import HEADINGS, footnotes, row_cells
from llmopt.bench.decode.workloads import MIXED
from llmopt.checkpoint.durable import write_bytes
from llmopt.report.templating import environment


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot with its legend.

    Attributes:
        title: above it.
        lead: what it shows, in a sentence.
        svg: the plot.
        legend: label and colour of every line.
    """

    title: str
    lead: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]


def write_decode_page(path: Path, report: DecodeReport) -> None:
    """Write the page in one step.

    Raises:
        StorageError: if the disk refuses.
    """
    write_bytes(path, render_decode_page(report).encode())


def render_decode_page(report: DecodeReport) -> str:
    """The whole page; every value that comes from outside is escaped."""
    template = environment(autoescape=True).get_template("decode.html.j2")
    style = files("llmopt.report").joinpath("templates/report.css").read_text("utf-8")
    return template.render(
        setting=report.setting,
        complete=report.complete,
        style=Markup(style),  # noqa: S704  # our own file
        figures=figures(report),
        break_even=[break_even_sentence(curve) for curve in break_even_curves(report)],
        standings=standings(report),
        headings=HEADINGS,
        rows=[row_cells(row) for row in report.rows],
        footnotes=footnotes(report),
    )


def figures(report: DecodeReport) -> list[Figure]:
    """For every context llmopt's settings, what each is worth, and the peers; mixed requests."""
    found = []
    contexts = sorted({row.context for row in report.measured if row.context is not None})
    for context in contexts:
        rows = [row for row in report.measured if row.context == context]
        ours = [row for row in rows if row.engine == LLMOPT]
        found += _rate_figures(context, ours, "settings", f"llmopt, context of {context:,}")
        found += _worth_figures(report, context)
        plain = [row for row in rows if (row.weights, row.kv) == (PLAIN, PLAIN)]
        # Of its kinds of files none is one of ours: they stand beside the plain weights.
        files_of = [row for row in rows if row.engine == "llama.cpp" and row.kv == PLAIN]
        peers = [*plain, *files_of]
        found += _rate_figures(context, peers, "peers", f"All engines, context of {context:,}")
    mixed = [row for row in report.measured if row.workload == MIXED]
    if mixed:
        bars = [
            (_label(row), row.rate) for row in sorted(mixed, key=lambda row: row.engine != LLMOPT)
        ]
        found.append(
            Figure(
                f"{mixed[0].batch} requests of mixed lengths",
                "Tokens a second from submission to the last token.",
                bar_plot("mixed", "Mixed requests", "tokens/s", bars),
                (),
            )
        )
    return found


def _rate_figures(context: int, rows: Sequence[DecodeRow], kind: str, title: str) -> list[Figure]:
    if not rows:
        return []
    lines: dict[str, list[DecodeRow]] = {}
    for row in rows:
        lines.setdefault(_label(row), []).append(row)
    series = [_series(label, found) for label, found in lines.items()]
    floors = [
        Series(
            f"floor of {label}",
            {row.batch: row.floor_tokens_per_s for row in found if row.floor_tokens_per_s},
            {},
            is_floor=True,
        )
        for label, found in lines.items()
        if found[0].engine == LLMOPT
    ]
    name = f"{kind}-{context}"
    return [
        Figure(
            title,
            "Tokens a second while all requests decode; bars span the 20th to the 80th "
            "percentile, dashed lines are what memory's bandwidth allows llmopt's settings.",
            batch_plot(name, title, "tokens/s", [*series, *floors]),
            tuple((line.label, colour_of(index)) for index, line in enumerate(series)),
        )
    ]


def _worth_figures(report: DecodeReport, context: int) -> list[Figure]:
    curves = [curve for curve in break_even_curves(report) if curve.context == context]
    if not curves:
        return []
    series = [
        Series(curve.setting, {point.batch: point.ratio for point in curve.points}, {})
        for curve in curves
    ]
    title = f"What a setting is worth, context of {context:,}"
    return [
        Figure(
            title,
            "Tokens a second over the same without it; below 1 it costs.",
            batch_plot(f"worth-{context}", title, "ratio", series, even_at=1.0),
            tuple((line.label, colour_of(index)) for index, line in enumerate(series)),
        )
    ]


def _series(label: str, rows: Sequence[DecodeRow]) -> Series:
    spreads = {}
    for row in rows:
        assert row.timing is not None
        rate = row.timing.tokens_per_s
        if rate.p20 != rate.p80:
            spreads[row.batch] = rate.p20, rate.p80
    return Series(label, {row.batch: row.rate for row in rows}, spreads)


def _label(row: DecodeRow) -> str:
    kv = "" if row.kv == PLAIN else f", {row.kv} KV"
    return f"{row.name}, {row.weights}{kv}"
