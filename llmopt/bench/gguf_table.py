"""The table of ``llmopt bench gguf``, for a terminal and for a document."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.bench.gguf import GGUFReport, GGUFRow
from llmopt.bench.table import MIB, row_line, source_line, spread_text

HEADINGS = (
    "type",
    "quantizer",
    "method",
    "s",
    "f32 MB/s",
    "MiB",
    "weighted error",
    "KL",
    "ppl ratio",
    "top-1",
)


def render_gguf_table(report: GGUFReport) -> RenderableType:
    """Rows and setting for a terminal."""
    table = Table(*HEADINGS)
    for row in report.rows:
        table.add_row(*row_cells(row))
    return Group(table, *(Text(line) for line in footnotes(report)))


def gguf_markdown(report: GGUFReport) -> str:
    """The same for a document."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(row_cells, report.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {line}" for line in footnotes(report)) + "\n"


def row_cells(row: GGUFRow) -> tuple[str, ...]:
    """The cells of a row; the status stands for the numbers where there are none."""
    run = row.run
    head = (run.scheme, run.quantizer, run.method)
    if run.status != "measured":
        return (*head, run.status, *("",) * (len(HEADINGS) - 4))
    quality = run.quality
    assert quality is not None and run.size_bytes is not None and row.weighted_error is not None
    return (
        *head,
        spread_text(run.quantize_s, lambda value: f"{value:.2f}"),
        spread_text(row.rate, lambda value: f"{value:.1f}"),
        f"{run.size_bytes / MIB:.2f}",
        f"{row.weighted_error:.5f}",
        f"{quality.kl:.6f}",
        f"{quality.perplexity / quality.reference_perplexity:.5f}",
        f"{quality.top1:.4f}",
    )


def footnotes(report: GGUFReport) -> list[str]:
    """What the numbers hold for, a line each; a quantizer's versions once."""
    setting = report.setting
    rows = [row.run for row in report.rows]
    fallbacks = {row.run.scheme: row.num_fallbacks for row in report.rows if row.num_fallbacks}
    repeats = max((run.repeats for run in rows), default=0)
    lines = [
        source_line(setting, rows),
        f"CPU: {setting.machine}; {setting.threads} threads; Python {setting.python}; commit "
        f"{setting.commit or 'unknown'}; {setting.date}",
        f"seconds and rates: medians of {repeats}; {report.f32_bytes / 1e6:.0f} MB of matrices in "
        "float32, from the opened file to the written one; the importance matrix and "
        "GPTQ's second moments are given, of the unquantized model",
    ]
    lines += [
        f"{kind}: {count} tensors in another type, whose blocks their rows make up"
        for kind, count in fallbacks.items()
    ]
    seen: set[tuple[str, ...]] = set()
    for run in rows:
        key = (run.quantizer, run.status, run.reason, *run.versions.values())
        if key not in seen:
            seen.add(key)
            lines.append(row_line(run))
    return lines
