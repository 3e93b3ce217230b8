"""Texts that end a generation, found in pieces as they come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passed:
    """What may be shown after a piece.

    Attributes:
        text: safe to show: no part of it belongs to a stop string.
        stopped: whether one has completed; nothing comes after.
    """

    text: str
    stopped: bool


class StopStrings:
    """Passes text on, except what is a stop string or may still become one.

    The stop string that completes first counts; of two that complete with the same character, the
    longer. So what is shown does not depend on how the text was cut into pieces.

    Args:
        stops: the stop strings, none empty.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops), "an empty stop string would stop at once"
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, piece: str) -> Passed:
        """Take the next piece of text."""
        if not self._stops:
            return Passed(piece, False)
        text = self._held + piece
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start = min(found)
            self._held = ""
            return Passed(text[:start], True)
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return Passed(text[: len(text) - num_held], False)

    def finish(self) -> str:
        """What was held back and has not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Characters at the end of ``text`` that begin a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
