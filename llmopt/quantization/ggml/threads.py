"""Chunks of rows side by side on several threads, the same numbers however many there are.

torch spreads one operation on a whole matrix over its threads, which the half dozen operands of a
search then push out of the caches, and splits a chunk that fits in them too finely to pay. Here
each thread computes whole chunks by itself; torch gives up Python's lock within operations. What a
chunk is does not depend on the number of threads, nor do its sums, whose order torch chooses by
where in an operation's share an element lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_T = TypeVar("_T")


def row_slices(num_rows: int, step: int) -> list[slice]:
    """``num_rows`` rows in runs of ``step``, the last one shorter."""
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def each_slice(
    work: Callable[[slice], _T], slices: Sequence[slice], device: torch.device
) -> list[_T]:
    """What ``work`` makes of each of ``slices``, in their order.

    On a CPU as many run at a time as torch has threads for one operation, each of them with one;
    elsewhere one after the other. The first error in order is raised.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return [work(rows) for rows in slices]
    inference = torch.is_inference_mode_enabled()

    def in_mode(rows: slice) -> _T:
        with torch.inference_mode(inference), torch.no_grad():  # modes belong to a thread
            return work(rows)

    with _workers(min(torch.get_num_threads(), len(slices))) as workers:
        return list(workers.map(in_mode, slices))


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose torch operations do not spread over others; ours go on as they did."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "llmopt-rows", lambda: torch.set_num_threads(1)) as workers:
            yield workers
    finally:
        # The number is a thread's own, but new threads begin with the one that was set last.
        torch.set_num_threads(threads)
