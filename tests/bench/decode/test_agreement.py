"""Tokens of two engines, compared."""

from __future__ import annotations

from llmopt.bench.decode.agreement import Agreement, compare


def test_identical_tokens() -> None:
    found = compare([[1, 2], [3, 4]], [[1, 2], [3, 4]], [[0.1, 0.1], [0.1, 0.1]])
    assert found == Agreement(2, 2)
    assert str(found) == "2/2 identical"


def test_the_first_difference_and_the_lead_there_are_told() -> None:
    wanted = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    found = [[1, 2, 3], [4, 0, 0], [7, 8, 0]]
    gaps = [[9.0] * 3, [9.0, 0.02, 9.0], [9.0, 9.0, 0.05]]
    agreement = compare(found, wanted, gaps)
    assert agreement == Agreement(3, 1, first_difference=1, largest_gap=0.05)
    assert str(agreement) == (
        "1/3 identical, else from token 2 on, where the lead was at most 0.050"
    )
    assert not agreement.is_beyond_noise  # nobody said how much noise there is
    assert compare(found, wanted, gaps, noise=0.049).is_beyond_noise
    assert not compare(found, wanted, gaps, noise=0.051).is_beyond_noise
    assert not compare(wanted, wanted, gaps, noise=0.0).is_beyond_noise
    assert str(compare(found, wanted)) == "1/3 identical, else from token 2 on"
