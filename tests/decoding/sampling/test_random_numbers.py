from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from llmopt.decoding.sampling.random_numbers import philox, uniforms

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the vectors that the paper's authors publish with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected) -> None:
    words = philox(
        tuple(np.array([word, 1], dtype=np.uint64) for word in counter),
        tuple(np.array([word, 2], dtype=np.uint64) for word in key),
    )
    assert tuple(int(word[0]) for word in words) == expected


def test_a_number_depends_on_its_coordinates_alone() -> None:
    seeds, streams, positions = [5, 2**63 + 1, 5, 5], [0, 0, 1, 0], [0, 3, 3, 4]
    together = uniforms(seeds, streams, positions)
    apart = [uniforms([a], [b], [c])[0] for a, b, c in zip(seeds, streams, positions, strict=True)]
    assert together.tolist() == apart
    assert len(set(apart)) == 4


@pytest.mark.parametrize("along", ["seeds", "streams", "positions"])
def test_the_numbers_are_uniform_and_uncorrelated_along_each_coordinate(along: str) -> None:
    count = 20_000
    run = np.arange(count, dtype=np.uint64)
    coordinates = {name: np.full(count, 3) for name in ("seeds", "streams", "positions")}
    numbers = uniforms(**{**coordinates, along: run})
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    for lag in (1, 2, 7):
        # The correlation of independent numbers has standard deviation 1 / sqrt(count).
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 4 / count**0.5
    # 53 bits: the lower half of the mantissa is as random as the upper.
    assert stats.kstest((numbers * 2**27) % 1, "uniform").pvalue > 1e-3
