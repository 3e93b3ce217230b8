"""Random numbers by counter: a number is a function of its coordinates and of nothing drawn before.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011), over a whole batch at once. So a request's numbers do not depend on its neighbours, on
how its prompt was cut, nor on whether it was preempted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]
"""32-bit words in 64-bit integers, so that a product of two keeps its upper half."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Four random words for each counter, under each key.

    Args:
        counter: four words, each ``(count,) uint64`` below 2³².
        key: two words of the same shape.

    Returns:
        Four words ``(count,) uint64`` below 2³².
    """
    first, second, third, fourth = counter
    low_key, high_key = key
    for _ in range(_ROUNDS):
        left, right = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        first, second, third, fourth = (
            (right >> _HALF) ^ second ^ low_key,
            right & _LOW,
            (left >> _HALF) ^ fourth ^ high_key,
            left & _LOW,
        )
        low_key = (low_key + np.uint64(_WEYL[0])) & _LOW
        high_key = (high_key + np.uint64(_WEYL[1])) & _LOW
    return first, second, third, fourth


def uniforms(seeds: ArrayLike, streams: ArrayLike, positions: ArrayLike) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2⁻⁵³, one for each (seed, stream, position).

    Args:
        seeds: ``(count,)`` whole numbers below 2⁶⁴.
        streams: ``(count,)`` below 2³²: which completion of the prompt.
        positions: ``(count,)`` below 2³²: which of its generated tokens.

    Returns:
        ``(count,) float64``.
    """
    seed = np.asarray(seeds, dtype=np.uint64)
    stream = np.asarray(streams, dtype=np.uint64)
    position = np.asarray(positions, dtype=np.uint64)
    nothing = np.zeros_like(position)
    first, second, _, _ = philox((position, nothing, stream, nothing), (seed & _LOW, seed >> _HALF))
    mantissa = ((first >> np.uint64(5)) << np.uint64(26)) | (second >> np.uint64(6))
    return mantissa.astype(np.float64) * 2.0**-53
