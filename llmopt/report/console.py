"""The report on a terminal, in a screenful."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.checkpoint.placement import report_folder
from llmopt.report import verdict_view
from llmopt.report.inspection import Inspection, TensorLine
from llmopt.report.schema import HTML_NAME, GGUFFileRecord, Report
from llmopt.report.summary import scheme_label, solver_label, summarise_layers
from llmopt.report.wording import count, duration, limit, number, percent, plural, size
from llmopt_evals.verdict import Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.panel import Panel
    from rich.table import Table

    from llmopt.agreement import Agreement

_STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def render_summary(report: Report, directory: Path | None = None) -> RenderableType:
    """Verdict, sizes and layers of an artifact for a rich console.

    Args:
        report: what to show.
        directory: where the artifact lies; names the page to open.
    """
    from rich.console import Group
    from rich.text import Text

    verdict = report.verdict
    return Group(
        _banner(verdict, report.name), _criteria(verdict), Text(), _facts(report, directory)
    )


def render_verdict(verdict: Verdict, notes: Sequence[str] = ()) -> RenderableType:
    """A verdict on its own; ``notes`` (files changed since it was gated, say) stand below."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(f"! {note}", style="yellow") for note in (*verdict.notes, *notes)]
    basis = Text(f"Measured on {verdict_view.basis(verdict)}.", style="dim")
    return Group(_banner(verdict, ""), _criteria(verdict), basis, *lines)


def render_contract(contract: Agreement) -> RenderableType:
    """Every check of a contract, those that do not hold in red with the reason."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "Check", "For", "Detail"):
        table.add_column(heading)
    groups = [("all", contract.checks)]
    groups += [(f"{item.name} {item.version}".strip(), item.checks) for item in contract.consumers]
    for consumer, checks in groups:
        for check in checks:
            outcome = "pass" if check.passed else "fail"
            sign = Text(verdict_view.SIGNS[outcome], style=_STYLES[outcome])
            table.add_row(sign, Text(check.name), Text(consumer), Text(check.detail))
    refused = plural(len(contract.refusals), "refusal")
    end = Text(f"The contract does not hold: {refused}.", style="bold red")
    if not contract.refusals:
        end = Text("The contract holds.", style="bold green")
    return Group(table, end)


def render_inspection(inspection: Inspection, *, list_tensors: bool = False) -> RenderableType:
    """What stands at a path; an artifact's report and what changed since come first."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if inspection.report is not None:
        parts += [render_summary(inspection.report), Text()]
        unchanged = Text("✓ every file is as it was gated", style="green")
        changed = [Text(f"! {line}", style="bold yellow") for line in inspection.changed]
        parts += [*(changed or [unchanged]), Text()]
    tensors = inspection.tensors
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    facts = [
        ("path", str(inspection.path)),
        ("kind", inspection.kind),
        ("architecture", inspection.architecture or "unknown"),
        ("tensors", f"{count(len(tensors))}, {size(num_bytes)}"),
        *((f"of {dtype}", text) for dtype, text in _dtype_facts(tensors)),
    ]
    if inspection.format is not None:
        facts.append(("format", inspection.format))
    if inspection.kind == "GGUF file":
        facts += _gguf_facts(inspection)
    if inspection.unread is not None:
        facts.append(("schemes", f"not read: {inspection.unread}"))
    word = "tensor" if inspection.kind == "GGUF file" else "layer"
    facts += [(name, plural(layers, word)) for name, layers in inspection.schemes.items()]
    facts += [(key, value) for key, value in inspection.metadata.items()]
    parts.append(_fact_table(facts))
    if list_tensors:
        parts += [Text(), _tensor_table(tensors)]
    return Group(*parts)


def _gguf_facts(inspection: Inspection) -> list[tuple[str, str]]:
    """What a GGUF file says of itself, and whether it is still true."""
    intact = {
        None: "no hash inside: not written by llmopt",
        True: "as their hash says",
        False: "CHANGED since llmopt wrote them",
    }
    return [
        ("verdict", inspection.verdict or "none: not gated by llmopt"),
        ("tensor data", intact[inspection.intact]),
    ]


def _dtype_facts(tensors: Sequence[TensorLine]) -> list[tuple[str, str]]:
    facts = []
    for dtype in sorted({tensor.dtype for tensor in tensors}):
        sizes = [tensor.num_bytes for tensor in tensors if tensor.dtype == dtype]
        facts.append((dtype, f"{count(len(sizes))}, {size(sum(sizes))}"))
    return facts


def _tensor_table(tensors: Sequence[TensorLine]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("Tensor", "Type", "Shape"):
        table.add_column(heading)
    table.add_column("Size", justify="right")
    for tensor in tensors:
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(Text(tensor.name), tensor.dtype, shape, size(tensor.num_bytes))
    return table


def _banner(verdict: Verdict, name: str) -> Panel:
    from rich.panel import Panel
    from rich.text import Text

    style = _STYLES[verdict.outcome]
    title = f"{verdict_view.SIGNS[verdict.outcome]} {verdict_view.HEADLINES[verdict.outcome]}"
    return Panel(
        Text(verdict_view.sentence(verdict)),
        title=Text(f"{title}: {name}" if name else title, style=f"bold {style}"),
        title_align="left",
        border_style=style,
    )


def _criteria(verdict: Verdict) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Criterion")
    for heading in ("Estimate", "Interval", "Margin"):
        table.add_column(heading, justify="right")
    table.add_column("Outcome")
    for row in verdict_view.criterion_rows(verdict):
        table.add_row(
            Text(row.label),
            number(row.estimate),
            f"{number(row.low)} – {number(row.high)}",
            f"{row.bound} {limit(row.margin)}",
            Text(f"{verdict_view.SIGNS[row.outcome]} {row.outcome}", style=_STYLES[row.outcome]),
        )
    return table


def _facts(report: Report, directory: Path | None) -> Table:
    sizes = report.sizes
    facts = [
        ("source", f"{report.source.name}, {report.source.architecture}, {report.source.dtype}"),
        ("became", f"{scheme_label(report)} by {solver_label(report)}, {report.format}"),
        (
            "weights",
            f"{size(sizes.source_bytes)} → {size(sizes.artifact_bytes)} "
            f"({percent(sizes.ratio)}, {number(sizes.bits_per_weight)} bits per weight)",
        ),
        ("ledger", _ledger(report)),
        *_layer_facts(report),
        *_file_facts(report.gguf),
        ("measured", verdict_view.basis(report.verdict)),
        *_margin_facts(report),
        ("took", duration(sum(report.timings.values()))),
    ]
    if directory is not None:
        facts += [("path", str(directory)), ("page", str(report_folder(directory) / HTML_NAME))]
    return _fact_table(facts)


def _fact_table(facts: Sequence[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, fact in facts:
        table.add_row(Text(name), Text(fact))
    return table


def _ledger(report: Report) -> str:
    totals = report.ledger.totals.items()
    return ", ".join(f"{total.num_tensors:,} {fate}" for fate, total in totals if total.num_tensors)


def _margin_facts(report: Report) -> list[tuple[str, str]]:
    bits = report.margins_for_bits
    return [] if bits is None else [("margins", f"from the margins of {bits}-bit weights")]


def _file_facts(file: GGUFFileRecord | None) -> list[tuple[str, str]]:
    """Types, fallbacks and importance of a GGUF file."""
    if file is None:
        return []
    types = ", ".join(f"{number} {name}" for name, number in file.types.items())
    facts = [("types", f"{file.mixture}: {types}; {size(file.num_bytes)} file")]
    facts.append(("importance", f"{file.importance}, of {plural(file.num_weighed, 'tensor')}"))
    if file.fallbacks:
        named = ", ".join(f"{t.name} ({t.type} for {t.wanted})" for t in file.fallbacks[:3])
        more = f" and {len(file.fallbacks) - 3} more" if len(file.fallbacks) > 3 else ""
        facts.append(("fallbacks", f"{named}{more}: rows are no whole blocks"))
    return facts + [("note", note) for note in file.notes]


def _layer_facts(report: Report) -> list[tuple[str, str]]:
    layers = summarise_layers(report.layers)
    if layers is None:
        return []
    what = "output" if layers.on_outputs else "weight"
    text = f"{count(layers.num_layers)}; largest {what} error {number(layers.worst_error)}"
    text += f" ({layers.worst.name})"
    if layers.gain is not None:
        text += f"; {percent(layers.gain)} of plain rounding's on average"
    facts = [("layers", text)]
    dead = report.coverage.num_dead_columns
    if layers.num_damped or dead:
        damped = plural(layers.num_damped, "layer")
        facts.append(
            ("coverage", f"damping raised in {damped}; {plural(dead, 'input column')} always zero")
        )
    return facts
