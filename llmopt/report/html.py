"""``report.html``: one self-contained page, no scripts, nothing fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from llmopt.checkpoint.durable import write_bytes
from llmopt.report import plots, templating, verdict_view
from llmopt.report.plots import KindErrors
from llmopt.report.schema import HTML_NAME, LayerRecord, Report
from llmopt.report.summary import (
    layer_error,
    measured_alike,
    scheme_label,
    solver_label,
    summarise_layers,
)
from llmopt_evals.verdict import Verdict

if TYPE_CHECKING:
    from jinja2 import Environment


def write_html(report: Report, directory: Path) -> Path:
    """Write ``report.html`` into ``directory`` in one step and return its path.

    Raises:
        StorageError: if the disk refuses.
    """
    path = directory / HTML_NAME
    write_bytes(path, (render_html(report)).encode())
    return path


def render_html(report: Report) -> str:
    """The whole page; every value that comes from outside is escaped."""
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report,
        style=Markup(files("llmopt.report").joinpath("templates/report.css").read_text("utf-8")),
        headline=verdict_view.HEADLINES[report.verdict.outcome],
        sign=verdict_view.SIGNS,
        sentence=verdict_view.sentence(report.verdict),
        criteria=verdict_view.criterion_rows(report.verdict),
        basis=verdict_view.basis(report.verdict),
        tiles=verdict_view.tiles(report.verdict),
        comparisons=verdict_view.comparisons(report.verdict),
        recall=verdict_view.recall_rows(report.verdict),
        recall_sentence=verdict_view.recall_sentence(report.verdict),
        layers=summarise_layers(report.layers),
        scheme=scheme_label(report),
        solver=solver_label(report),
        recipe_text=json.dumps(report.recipe.data, indent=2, ensure_ascii=False),
        figures=_verdict_figures(report.verdict),
        totals={fate: total for fate, total in report.ledger.totals.items() if total.num_tensors},
        panels=_panels(report.layers, solver_label(report)),
        total_seconds=math.fsum(report.timings.values()),
    )


def _verdict_figures(verdict: Verdict) -> dict[str, Markup]:
    data = verdict.plots
    figures = {}
    if verdict.criteria:
        figures["intervals"] = plots.interval_plot(verdict_view.intervals(verdict))
    if sum(data.kl_counts) > 0:
        figures["histogram"] = plots.histogram_plot(
            [10**edge for edge in data.kl_log10_edges],
            data.kl_counts,
            verdict_view.kl_marks(verdict),
        )
    if data.units:
        ratios = [unit.perplexity_ratio for unit in data.units]
        figures["units"] = plots.unit_plot(ratios, verdict_view.ratio_margin(verdict))
    if data.positions:
        figures["position"] = plots.position_plot(
            [(bucket.start + bucket.stop - 1) / 2 for bucket in data.positions],
            [bucket.mean_kl for bucket in data.positions],
        )
    return figures


def _panels(layers: Sequence[LayerRecord], solver: str) -> list[Markup]:
    kinds = kind_errors(measured_alike(layers))
    values = [value for kind in kinds for value in (*kind.ours, *kind.plain)]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return []
    bounds = (min(positive) / 1.35, max(positive) * 1.35)
    return [plots.kind_plot(kind, index, bounds, solver) for index, kind in enumerate(kinds)]


def kind_errors(layers: Sequence[LayerRecord]) -> list[KindErrors]:
    """Errors by kind of linear and block; the experts of a block count by their worst.

    What lies outside the blocks has no place on their axis; the table of layers has it.
    """
    kinds: dict[str, dict[int, tuple[float, float]]] = {}
    for layer in layers:
        if layer.block is None:
            continue
        by_block = kinds.setdefault(layer.kind, {})
        plain = math.nan if layer.plain_output_error is None else layer.plain_output_error
        known = by_block.get(layer.block)
        if known is None or layer_error(layer) > known[0]:
            by_block[layer.block] = (layer_error(layer), plain)
    return [
        KindErrors(
            kind=kind,
            blocks=tuple(sorted(by_block)),
            ours=tuple(by_block[block][0] for block in sorted(by_block)),
            plain=tuple(by_block[block][1] for block in sorted(by_block)),
        )
        for kind, by_block in kinds.items()
    ]


@cache
def _environment() -> Environment:
    return templating.environment(autoescape=True)
