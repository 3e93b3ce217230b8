"""The jinja2 environment that the card and the page share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmopt.report import wording

if TYPE_CHECKING:
    from jinja2 import Environment

_FILTERS: tuple[Callable[..., str], ...] = (
    wording.number,
    wording.limit,
    wording.count,
    wording.plural,
    wording.size,
    wording.percent,
    wording.duration,
)


def environment(
    *, autoescape: bool, finalize: Callable[[object], object] | None = None
) -> Environment:
    """Templates of this package; a name that a template misspells is an error.

    Args:
        autoescape: HTML escaping of every value.
        finalize: applied to every value before it is written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("llmopt.report", "templates"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {function.__name__: function for function in _FILTERS}
    return made
