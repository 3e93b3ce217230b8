"""Numbers as people read them: four significant digits, binary bytes, short names."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Four significant digits: ``12.35``, ``1,234,000``, ``3.21e-05``, ``-`` for none."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    rounded = float(f"{value:.3e}")
    magnitude = math.floor(math.log10(abs(rounded)))
    if magnitude < -4 or magnitude > 8:
        return f"{rounded:.3e}"
    return f"{rounded:,.{max(0, 3 - magnitude)}f}"


def limit(value: float) -> str:
    """A margin as someone wrote it: ``1.05``, ``0.9``, ``-0.03``."""
    return f"{value:.6g}" if math.isfinite(value) else number(value)


def count(value: int) -> str:
    """A whole number with thousands separated."""
    return f"{value:,}"


def plural(value: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def size(num_bytes: float) -> str:
    """Bytes in the largest binary unit below them: ``512 B``, ``7.936 MiB``."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if float(f"{value:.4g}") < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.4g} {unit}"


def percent(share: float) -> str:
    """A share as percent, three digits: ``37.4 %``."""
    return f"{100 * share:.3g} %" if math.isfinite(share) else number(share)


def duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 07 s``, ``2 h 05 min``."""
    if float(f"{seconds:.3g}") < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shortened(text: str, length: int) -> str:
    """The text with its middle cut out when it is longer than ``length`` characters."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"
