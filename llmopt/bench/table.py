"""The benchmark's table, for a terminal and for a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.bench.rows import BenchReport, Row, Setting, Spread

MIB = 1 << 20
HEADINGS = (
    "quantizer",
    "method",
    "scheme",
    "quantize s",
    "of floor",
    "wall s",
    "CPU s",
    "peak MiB",
    "beyond own MiB",
    "of bound",
    "size MiB",
    "perplexity",
    "KL",
    "top-1",
)
NARROW = (
    "quantizer",
    "method",
    "quantize s",
    "of floor",
    "CPU s",
    "beyond own MiB",
    "of bound",
    "KL",
    "top-1",
)


def render_table(report: BenchReport) -> RenderableType:
    """Rows, floor and setting for a terminal: the columns that fit into 80 characters."""
    table = Table(*NARROW)
    places = [HEADINGS.index(name) for name in NARROW]
    for row in table_rows(report):
        table.add_row(*(row[place] for place in places))
    return Group(table, *(Text(line) for line in footnotes(report)))


def markdown_table(report: BenchReport) -> str:
    """The same for a document."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *table_rows(report)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {line}" for line in footnotes(report)) + "\n"


def table_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """The cells: the floors first, then the rows in the order in which they ran."""
    floors = (
        ("floor: float32", report.floor.float32_s),
        ("floor: bf16 + fp32", report.floor.mixed_s),
        ("floor: bfloat16", report.floor.bfloat16_s),
    )
    blank = ("",) * (len(HEADINGS) - 4)
    cells = [(name, "calibration", "", f"{seconds:.1f}", *blank) for name, seconds in floors]
    return cells + [_cells(row, report) for row in report.rows]


def _cells(row: Row, report: BenchReport) -> tuple[str, ...]:
    head = (row.quantizer, row.method, row.scheme)
    if row.status != "measured":
        return (*head, row.status, *("",) * (len(HEADINGS) - 4))
    assert row.quality is not None and row.size_bytes is not None
    calibrated = row.method != "rtn"
    bound = report.setting.memory_bound_bytes
    return (
        *head,
        spread_text(row.quantize_s, _seconds),
        _over(row.quantize_s, report.floor.mixed_s) if calibrated else "",
        spread_text(row.wall_s, _seconds),
        spread_text(row.cpu_s, _seconds),
        spread_text(row.peak_rss_bytes, _mebibytes),
        spread_text(row.beyond_own_bytes, _mebibytes),
        _over(row.beyond_own_bytes, bound) if calibrated else "",
        f"{row.size_bytes / MIB:.2f}",
        f"{row.quality.perplexity:.3f}",
        f"{row.quality.kl:.6f}",
        f"{row.quality.top1:.4f}",
    )


def footnotes(report: BenchReport) -> list[str]:
    """What the numbers hold for, a line each."""
    setting, rate, work = report.setting, report.floor.rate, report.floor.work
    return [
        source_line(setting, report.rows),
        f"{setting.machine}; {setting.threads} threads; Python {setting.python}; commit "
        f"{setting.commit or 'unknown'}; {setting.date}",
        f"floor: {work.forward / 1e12:.2f} TFLOP for one forward of the blocks, "
        f"{work.hessians / 1e12:.2f} for the Hessians, over {rate.float32 / 1e9:.0f} GFLOP/s in "
        f"float32 and {rate.bfloat16 / 1e9:.0f} in bfloat16; 'of floor' takes bfloat16 for the "
        "forward and float32 for the Hessians",
        f"bound of memory: {setting.memory_bound_bytes / MIB:.0f} MiB, the largest block and its "
        "Hessians in float32 and the hidden states in 16 bit, in and out; 'beyond own' is above "
        "the interpreter with its imports",
        *(row_line(row) for row in report.rows if row.versions or row.reason),
    ]


def source_line(setting: Setting, rows: Sequence[Row]) -> str:
    """The model and its texts."""
    quality = next((row.quality for row in rows if row.quality), None)
    reference = f"perplexity {quality.reference_perplexity:.3f} unquantized" if quality else ""
    return (
        f"{setting.model}, {setting.num_parameters / 1e6:.1f} M parameters; calibrated on "
        f"{setting.num_samples} x {setting.length} tokens, measured on "
        f"{setting.held_out_tokens:,} held-out ones{', ' if reference else ''}{reference}"
    )


def row_line(row: Row) -> str:
    """A row's versions, phases and notes, or why there are none."""
    if row.status != "measured":
        lines = row.reason.splitlines()
        # Of a traceback, what went wrong stands at its end.
        reason = " ".join(dict.fromkeys((lines[0], lines[-1].strip())))
        return f"{row.quantizer} {row.method}: {row.status}: {reason}"
    parts = [", ".join(f"{name} {number}" for name, number in row.versions.items())]
    if row.phases_s:
        parts.append(", ".join(f"{name} {value:.1f} s" for name, value in row.phases_s.items()))
    repeats = f", {row.repeats} runs" if row.repeats > 1 else ""
    return f"{row.quantizer} {row.method}{repeats}: " + "; ".join((*parts, *row.notes))


def spread_text(spread: Spread | None, text: Callable[[float], str]) -> str:
    """The median, and the other percentiles where they differ."""
    assert spread is not None
    if spread.p20 == spread.p80:
        return text(spread.p50)
    return f"{text(spread.p50)} ({text(spread.p20)}–{text(spread.p80)})"


def _over(spread: Spread | None, least: float) -> str:
    assert spread is not None
    return f"{spread.p50 / least:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.1f}"


def _mebibytes(value: float) -> str:
    return f"{value / MIB:.0f}"
