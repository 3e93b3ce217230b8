"""A matplotlib figure as inline SVG: real text, the page's font, the page's colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

INK = "#1c2733"
MUTED = "#5d6b7a"
GRID = "#d9e0e7"
OURS = "#0b67b2"
PLAIN = "#c8600a"
GOOD = "#0f7f52"
BAD = "#c2203a"
UNSURE = "#9a6a00"
ZONE = "#e3f3ec"
CARD = "#ffffff"

VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    OURS: "ours",
    PLAIN: "plain",
    GOOD: "good",
    BAD: "bad",
    UNSURE: "unsure",
    ZONE: "zone",
    CARD: "card",
}
"""Colours a plot may use and the style sheet's variable that takes their place on the page."""

_RC: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a layer's name is a dollar sign
    "text.usetex": False,
    "axes.unicode_minus": False,
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


@contextmanager
def drawing(
    width: float, height: float, *, left: float = 0.62, top: float = 0.12
) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one axes in the report's style.

    The margins are fixed (the browser sets the text, so measuring it here would only cost time).

    Args:
        width: in inches, as all of these.
        height: of the whole.
        left: margin for the tick labels and the axis label.
        top: margin for a title.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(rc=_RC):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        bottom, right = 0.48, 0.12
        box = (
            left / width,
            bottom / height,
            1 - (left + right) / width,
            1 - (bottom + top) / height,
        )
        yield figure, figure.add_axes(box)


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Inline SVG of a figure made by :func:`drawing`, inside its ``with`` block.

    Args:
        figure: the figure.
        name: unique on the page; keeps the identifiers of two plots apart.
        title: what a screen reader announces.
        description: what the plot shows, in a sentence.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(rc={"svg.hashsalt": name}), warnings.catch_warnings():
        # Text is left to the browser, which has glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_for_page(buffer.getvalue(), name, title, description))


def _for_page(document: str, name: str, title: str, description: str) -> str:
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None, "matplotlib wrote an SVG without a viewBox"
    inner = body[body.index(">") + 1 : body.rindex("</svg>")]
    inner = re.sub(r'<g id="[^"]*">', "<g>", inner)
    inner = inner.replace("xlink:href=", "href=")
    inner = re.sub(r'style="[^"]*"', lambda match: _themed(match.group()), inner)
    inner = re.sub(r"\n\s*", "\n", inner)
    return (
        f'<svg viewBox="{view_box.group(1)}" role="img" '
        f"aria-labelledby={quoteattr(f'{name}-title {name}-desc')}>\n"
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>{inner}</svg>'
    )


def _themed(style: str) -> str:
    style = re.sub(
        r"font: ((?:[\w.]+ )*?)([\d.]+px) [^;\"]*",
        lambda match: f"font: {match[1]}{match[2]} var(--font, sans-serif)",
        style,
    )
    return re.sub(r"#[0-9a-f]{6}", lambda match: _variable(match.group()), style)


def _variable(colour: str) -> str:
    name = VARIABLES.get(colour)
    return colour if name is None else f"var(--{name}, {colour})"
