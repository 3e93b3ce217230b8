"""The table of ``llmopt bench decode``, for a terminal and for a document."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.bench.decode.break_even import sentences
from llmopt.bench.decode.rows import DecodeReport, DecodeRow
from llmopt.bench.decode.traffic import Bandwidth
from llmopt.bench.table import MIB, spread_text

HEADINGS = (
    "engine",
    "weights",
    "KV",
    "batch",
    "context",
    "tokens/s",
    "floor",
    "of floor",
    "GB/s",
    "first token s",
    "token p50 ms",
    "token p99 ms",
    "peak MiB",
    "same tokens",
)
NARROW = (
    "engine",
    "weights",
    "KV",
    "batch",
    "context",
    "tokens/s",
    "of floor",
    "first token s",
    "token p99 ms",
    "peak MiB",
    "same tokens",
)


def render_decode_table(report: DecodeReport) -> RenderableType:
    """Rows, sentences and setting for a terminal."""
    table = Table(*NARROW)
    places = [HEADINGS.index(name) for name in NARROW]
    for row in report.rows:
        cells = row_cells(row)
        table.add_row(*(cells[place] for place in places))
    lines = [*sentences(report), *footnotes(report)]
    return Group(Text(report.setting.model), table, *map(Text, lines))


def decode_markdown(report: DecodeReport) -> str:
    """The same for a document."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(row_cells, report.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    found, notes = (
        "\n".join(f"- {line}" for line in part) for part in (sentences(report), footnotes(report))
    )
    title = f"**{report.setting.model}**"
    return f"{title}\n\n{table}\n\n" + (f"{found}\n\n" if found else "") + f"{notes}\n"


def row_cells(row: DecodeRow) -> tuple[str, ...]:
    """The cells of a row; the status stands for the numbers where there are none."""
    context = "mixed" if row.context is None else f"{row.context}"
    name = f"{row.name} (grown)" if row.is_grown else row.name
    head = (name, row.weights, row.kv, str(row.batch), context)
    if row.status != "measured":
        told = "" if row.agreement is None else str(row.agreement)
        return (*head, row.status, *("",) * (len(HEADINGS) - 7), told)
    timing = row.timing
    assert timing is not None and row.peak_bytes is not None
    achieved, of_floor = row.achieved_bytes_per_s, row.of_floor
    return (
        *head,
        spread_text(timing.tokens_per_s, lambda value: f"{value:.1f}"),
        "" if row.floor_tokens_per_s is None else f"{row.floor_tokens_per_s:.1f}",
        "" if of_floor is None else f"{of_floor:.2f}",
        "" if achieved is None else f"{achieved / 1e9:.1f}",
        spread_text(timing.first_token_s, lambda value: f"{value:.3f}"),
        f"{1e3 * timing.inter_token_p50_s:.1f}",
        f"{1e3 * timing.inter_token_p99_s:.1f}",
        f"{row.peak_bytes / MIB:.0f}",
        "" if row.agreement is None else str(row.agreement),
    )


def footnotes(report: DecodeReport) -> list[str]:
    """What the numbers hold for, a line each."""
    setting = report.setting
    repeats = max((row.repeats for row in report.rows), default=0)
    grown = "; grown: it computes what its source computes, at this size's cost"
    return [
        f"{setting.model}, {setting.num_parameters / 1e6:.1f} M parameters, {setting.dtype}"
        f"{grown if setting.is_grown else ''}",
        f"{setting.machine}; {setting.threads} threads; Python {setting.python}; commit "
        f"{setting.commit or 'unknown'}; {setting.date}",
        f"medians of {repeats} runs (20th-80th percentile); {setting.new_tokens} new tokens a "
        "request, greedy; tokens/s from the last prompt read to the last token, of mixed requests "
        "from submission; peak memory beyond the interpreter with its imports",
        floor_line(setting.bandwidth),
        *engine_lines(report.rows),
    ]


def floor_line(bandwidth: Bandwidth) -> str:
    """What the column is."""
    return (
        "floor: bytes of weights and of keys and values that a step reads, over "
        f"{bandwidth.bytes_per_s / 1e9:.1f} GB/s, as measured by {bandwidth.method} with "
        f"{bandwidth.threads} threads in this run; GB/s: those bytes over the time of a step"
    )


def engine_lines(rows: Sequence[DecodeRow]) -> list[str]:
    """Versions and notes of every engine once, and why there are no numbers."""
    lines: dict[str, None] = {}
    for row in rows:
        if row.status == "measured":
            versions = ", ".join(f"{name} {number}" for name, number in row.versions.items())
            lines["; ".join((f"{row.engine}: {versions}", *row.notes))] = None
        else:
            told = row.reason.splitlines() or [""]
            # Of a traceback, what went wrong stands at its end.
            reason = " ".join(dict.fromkeys((told[0], told[-1].strip())))
            lines[f"{row.name}, {row.weights}, KV {row.kv}: {row.status}: {reason}"] = None
    return list(lines)
