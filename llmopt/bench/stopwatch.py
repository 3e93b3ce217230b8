"""Seconds by phase of one thread, each phase without those that run inside it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Phases may nest; a second counts for the innermost one alone.

    Attributes:
        seconds: by phase.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the context's time for ``name``."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def watch(self, owner: object, attribute: str, phase: str) -> None:
        """Let every call of ``owner.attribute`` count for ``phase``, from now on."""
        function: Callable[..., object] = getattr(owner, attribute)
        setattr(owner, attribute, self._wrapped(function, phase))

    def _wrapped(self, function: Callable[P, R], phase: str) -> Callable[P, R]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.phase(phase):
                return function(*args, **kwargs)

        return timed

    def _charge(self) -> None:
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
