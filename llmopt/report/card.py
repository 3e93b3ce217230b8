"""``README.md``: the model card, with the front matter that model hubs read."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from markupsafe import Markup
from pydantic import JsonValue

from llmopt.checkpoint.durable import write_bytes
from llmopt.report import templating, verdict_view
from llmopt.report.schema import CARD_NAME, HTML_NAME, JSON_NAME, Report
from llmopt.report.summary import scheme_label, solver_label

if TYPE_CHECKING:
    from jinja2 import Environment

_UNSAFE = re.compile(r"[^\w.+-]")  # of a file name inside a command
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def write_card(report: Report, directory: Path) -> Path:
    """Write ``README.md`` into ``directory`` in one step and return its path.

    Raises:
        StorageError: if the disk refuses.
    """
    path = directory / CARD_NAME
    write_bytes(path, (render_card(report)).encode())
    return path


def render_card(report: Report) -> str:
    """The model card; values from outside cannot start Markdown or HTML of their own."""
    header = yaml.safe_dump(front_matter(report), sort_keys=False, allow_unicode=True)
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            report=report,
            front_matter=Markup(header),
            sentence=verdict_view.sentence(report.verdict),
            criteria=verdict_view.criterion_rows(report.verdict),
            basis=verdict_view.basis(report.verdict),
            sign=verdict_view.SIGNS,
            scheme=scheme_label(report),
            solver=solver_label(report),
            recall=verdict_view.recall_rows(report.verdict),
            recall_sentence=verdict_view.recall_sentence(report.verdict),
            names={"html": HTML_NAME, "json": JSON_NAME},
            consumers={item.name: item.version for item in report.consumers},
        )
    )


def front_matter(report: Report) -> dict[str, JsonValue]:
    """The card's metadata: base model, library, tags, quantization."""
    schemes = sorted({layer.scheme.name for layer in report.layers})
    bits = sorted({layer.scheme.bits for layer in report.layers})
    solvers = sorted({layer.solver for layer in report.layers})
    header: dict[str, JsonValue] = {}
    if report.source.license:
        header["license"] = report.source.license
    if _HUB_NAME.fullmatch(report.source.name):
        header["base_model"] = report.source.name
        header["base_model_relation"] = "quantized"
    widths = () if report.gguf else (f"int{width}" for width in bits)
    tags = ["llmopt", "quantized", *widths, *solvers, report.format]
    if report.gguf:
        header["quantized_by"] = "llmopt"
    header |= {
        "library_name": "gguf" if report.gguf else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
        "quantization": {
            "tool": f"llmopt {report.llmopt_version}",
            "recipe": report.recipe.name,
            "schemes": list(schemes),
            "solvers": list(solvers),
            "format": report.format,
            "bits_per_weight": report.sizes.bits_per_weight,
            "verdict": report.verdict.outcome,
        },
    }
    return header


def markdown_text(value: object) -> object:
    """Anything but markup of ours, so that Markdown shows it letter by letter on one line."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    one_line = " ".join(value.split())
    escaped = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", escaped)


def code(value: str) -> Markup:
    """A hash or a name in a code span."""
    return Markup("`" + re.sub(r"[`|\s]", "?", value) + "`")


@cache
def _environment() -> Environment:
    # Markdown's own escaping takes the place of HTML's, on every value alike.
    environment = templating.environment(autoescape=False, finalize=markdown_text)
    environment.filters["code"] = code
    environment.filters["plain"] = lambda name: Markup(_UNSAFE.sub("?", name))
    return environment
