"""When two consumers' answers say the same, and when they differ."""

from __future__ import annotations

from itertools import chain

from interop.protocol import Answer


def differences(one: Answer, other: Answer) -> list[float]:
    """Absolute difference of each prompt token's log-probability, in nats."""
    rows = zip(one.log_probs, other.log_probs, strict=True)
    return [abs(a - b) for row in rows for a, b in zip(*row, strict=True)]


def mean_difference(one: Answer, other: Answer) -> float:
    """Mean absolute difference of the prompt tokens' log-probabilities, in nats."""
    told = differences(one, other)
    return sum(told) / len(told)


def real_divergences(plain: Answer, other: Answer, noise: float) -> list[str]:
    """Where greedy tokens differ though ``plain`` was sure of its choice.

    What follows a first difference has another context and is not compared. A difference is a
    near-tie if the best two tokens of ``plain`` lie within twice ``noise`` (both may move by it).
    """
    found = []
    for row, (expected, got, gaps) in enumerate(
        zip(plain.tokens, other.tokens, plain.gaps, strict=True)
    ):
        for position, (a, b, gap) in enumerate(zip(expected, got, gaps, strict=True)):
            if a != b:
                if gap > 2 * noise:
                    found.append(f"prompt {row}, token {position}: {a} != {b}, gap {gap:.4f}")
                break
    return found


def num_equal_tokens(plain: Answer, other: Answer) -> int:
    """Greedy tokens that are equal up to each prompt's first difference."""
    return sum(chain.from_iterable(map(_equal_prefix, plain.tokens, other.tokens)))


def _equal_prefix(one: list[int], other: list[int]) -> list[bool]:
    flags = [a == b for a, b in zip(one, other, strict=True)]
    return flags[: flags.index(False)] if False in flags else flags
