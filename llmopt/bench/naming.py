"""Names on the benchmarks' command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from llmopt.errors import BadInputError


def known(name: str, choices: Sequence[str], kind: str) -> str:
    """The name, where it is one of the choices.

    Args:
        name: as it was typed.
        choices: to take from.
        kind: what it names, for the message.

    Raises:
        BadInputError: unknown name (with the nearest one).
    """
    if name in choices:
        return name
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise BadInputError(f"unknown {kind} {name!r}{hint}", f"choose one of {', '.join(choices)}")
