"""When tokens came, in a few numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from llmopt.bench.rows import Spread, spread

Times = Sequence[Sequence[float]]
"""Of one run: for every request the seconds after its start at which each token was known."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One workload by one engine.

    Attributes:
        tokens_per_s: of all requests together while they decode: from the moment at which the last
            prompt is read to the last token. Of mixed requests, from the start: prompts are read
            while others decode.
        first_token_s: a request's seconds from submission to its first token, the median request.
        inter_token_p50_s: between two tokens of a request, over requests and runs.
        inter_token_p99_s: likewise.
    """

    tokens_per_s: Spread
    first_token_s: Spread
    inter_token_p50_s: float
    inter_token_p99_s: float


def summarise(runs: Sequence[Times], *, whole: bool = False) -> Timing:
    """Percentiles over runs of rates and first tokens, over all tokens of what lies between.

    Args:
        runs: at least one.
        whole: count from the start.
    """
    rate = whole_rate if whole else decode_rate
    between = sorted(
        later - earlier
        for times in runs
        for request in times
        for earlier, later in zip(request, request[1:], strict=False)
    )
    firsts = [statistics.median(request[0] for request in times) for times in runs]
    return Timing(
        spread([rate(times) for times in runs]),
        spread(firsts),
        percentile(between, 50),
        percentile(between, 99),
    )


def decode_rate(times: Times) -> float:
    """Tokens a second from when every request has its first token."""
    start = max(request[0] for request in times)
    end = max(request[-1] for request in times)
    count = sum(moment > start for request in times for moment in request)
    return count / (end - start)


def whole_rate(times: Times) -> float:
    """Tokens a second from submission to the last one."""
    return sum(map(len, times)) / max(request[-1] for request in times)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least value that so many per cent do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
