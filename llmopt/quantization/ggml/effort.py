"""How much the least squares search tries, by type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried.

    Attributes:
        widths: grids that each sub-block is tried on first: levels that its range is spread over,
            in parts of those there are; above 1 the outermost values are clipped.
        moves: how far the ends of the best grid so far are moved then, in parts of a step.
        both_directions: try the largest value at either end of the levels.
        starts: the first ``d`` of a block is the largest step over the largest whole number and
            over one of these; the best by estimate of each group is tried.
        sweeps: over whole blocks.
    """

    widths: tuple[float, ...]
    moves: tuple[float, ...] = (0.5, 0.25)
    both_directions: bool = False
    starts: tuple[tuple[float, ...], ...] = ((1.0,),)
    sweeps: int = 2


def _even(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * index / (count - 1) for index in range(count))


_FINE = (_even(0.98, 1.06, 9),)
_COARSE = (_even(0.9, 1.1, 7), _even(1.15, 1.4, 6), _even(1.5, 2.5, 6))
_RANGE_MOVES = (1.0, 0.6, 0.4, 0.25)

EFFORTS = {
    "Q8_0": Effort(_even(0.995, 1.01, 4), moves=()),
    "Q4_0": Effort(_even(0.92, 1.25, 8), moves=()),
    "Q5_0": Effort(_even(0.95, 1.14, 8), moves=()),
    "Q4_1": Effort((1.0, 1.15), moves=_RANGE_MOVES, sweeps=3),
    "Q5_1": Effort((1.0, 1.08), moves=_RANGE_MOVES, sweeps=3),
    "Q2_K": Effort(_even(0.8, 1.6, 8), starts=_COARSE, sweeps=4),
    "Q3_K": Effort(_even(0.85, 1.4, 10), moves=(), both_directions=True, starts=_FINE, sweeps=3),
    "Q4_K": Effort((1.0, 1.15), moves=_RANGE_MOVES, starts=_FINE, sweeps=3),
    "Q5_K": Effort((1.0, 1.08), moves=_RANGE_MOVES, starts=_FINE, sweeps=3),
    "Q6_K": Effort(_even(0.97, 1.06, 8), moves=(), starts=_FINE),
    "IQ4_NL": Effort(_even(0.92, 1.25, 10), both_directions=True, sweeps=3),
    "IQ4_XS": Effort(_even(0.92, 1.25, 10), both_directions=True, starts=_FINE, sweeps=3),
}
"""What each type has by default; more of anything costs time in proportion."""
