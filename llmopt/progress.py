"""How long-running functions tell how far they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the task's label, steps completed and steps in all."""


def silent(_task: str, _completed: int, _total: int) -> None:
    """Tell nobody."""
