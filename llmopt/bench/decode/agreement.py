"""Whether engines give the same greedy tokens, before any of them is timed.

What is owed: identical, or a first difference only where the reference's best token barely led.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Tokens = Sequence[Sequence[int]]
Gaps = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """An engine's tokens against the reference's.

    Attributes:
        requests: that were compared.
        identical: of them, to the last token.
        first_difference: place in the answer, of the request that differs first; none if none.
        largest_gap: by how much the reference's best logit led, at most, where a request differs
            first; none if none does, or the reference does not tell.
        noise: by how much another batch shape moves a lead of the reference's own; none if it does
            not tell.
    """

    requests: int
    identical: int
    first_difference: int | None = None
    largest_gap: float | None = None
    noise: float | None = None

    @property
    def is_beyond_noise(self) -> bool:
        """Whether a request differs where rounding does not explain it."""
        if self.largest_gap is None or self.noise is None:
            return False
        return self.largest_gap > self.noise

    def __str__(self) -> str:
        """A cell of the table."""
        told = f"{self.identical}/{self.requests} identical"
        if self.first_difference is None:
            return told
        told += f", else from token {self.first_difference + 1} on"
        if self.largest_gap is not None:
            told += f", where the lead was at most {self.largest_gap:.3f}"
        return told


def compare(
    found: Tokens, wanted: Tokens, gaps: Gaps | None = None, noise: float | None = None
) -> Agreement:
    """Compare answers request by request.

    Args:
        found: an engine's.
        wanted: the reference's, of the same lengths.
        gaps: how far the reference's best logit led at each of its tokens.
        noise: how far another batch shape moves such a lead.
    """
    places = []
    leads = []
    for row, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        pairs = enumerate(zip(mine, theirs, strict=True))
        place = next((index for index, (a, b) in pairs if a != b), None)
        if place is not None:
            places.append(place)
            if gaps is not None:
                leads.append(gaps[row][place])
    return Agreement(
        requests=len(wanted),
        identical=len(wanted) - len(places),
        first_difference=min(places, default=None),
        largest_gap=max(leads, default=None),
        noise=noise,
    )
