"""What the attention of one step needs to know of its sequences, found once for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmopt.decoding.kv.layout import LayerPlace
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.paging.groups import PageTable
from llmopt.decoding.scheduler import ScheduledChunk


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of a sequence in one pool.

    Attributes:
        recent: whether they lie in the layer's ``recent`` pool.
        length: tokens.
        begin: of the first, by token of the pool, when the pages are consecutive.
        pages: ``(n,) int64`` that hold them, when they are not.
        offset: of the first token in the first of ``pages``.
    """

    recent: bool
    length: int
    begin: int = 0
    pages: Tensor | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """Consecutive queries of one sequence, and the tokens that one of them at least sees.

    Attributes:
        rows: of the packed forward.
        start: position of the first query.
        first: position of the first token read; those up to the last query's follow.
        window: positions that a query sees, its own included.
        spans: where the tokens lie, in order; of int4 first quantized ones, then recent ones.
    """

    rows: slice
    start: int
    first: int
    window: int | None
    spans: tuple[Span, ...]

    @property
    def num_queries(self) -> int:
        """Rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def num_tokens(self) -> int:
        """Tokens read."""
        return self.start + self.num_queries - self.first

    @property
    def sees_all(self) -> bool:
        """Whether every query sees every token that is read."""
        return self.num_queries == 1

    @property
    def is_square(self) -> bool:
        """Whether query ``i`` sees the tokens 0 to ``i`` of those read."""
        return self.first == self.start and (self.window is None or self.num_queries <= self.window)

    def visible(self) -> Tensor:
        """Which tokens a query sees: ``(num_queries, num_tokens)`` bool."""
        query = torch.arange(self.start, self.start + self.num_queries)[:, None]
        token = torch.arange(self.first, self.start + self.num_queries)
        seen = token <= query
        return seen if self.window is None else seen & (token > query - self.window)


def chunk_rows(chunks: Sequence[ScheduledChunk]) -> list[slice]:
    """The rows of each chunk in the packed forward."""
    ends = [0]
    for chunk in chunks:
        ends.append(ends[-1] + chunk.num_tokens)
    return [slice(begin, end) for begin, end in pairwise(ends)]


def plan_readings(
    chunks: Sequence[ScheduledChunk], place: LayerPlace, config: KVCacheConfig
) -> tuple[Reading, ...]:
    """What the layers in one place read, chunk by chunk."""
    readings = []
    for chunk, rows in zip(chunks, chunk_rows(chunks), strict=True):
        for start, end in segments(chunk, place, config):
            window = place.layer.window
            first = 0 if window is None else max(0, start + 1 - window)
            begin = rows.start + start - chunk.start
            spans = _spans(chunk, place, config, first, start, end)
            readings.append(Reading(slice(begin, begin + end - start), start, first, window, spans))
    return tuple(readings)


def slots_of(chunk: ScheduledChunk, group: str, page_size: int) -> list[int]:
    """Where the chunk's tokens are written: ``page * page_size + offset``, one a token."""
    table = chunk.tables[group]
    slots: list[int] = []
    position, end = chunk.start, chunk.start + chunk.num_tokens
    while position < end:
        index, offset = divmod(position, page_size)
        stop = min(end, (index + 1) * page_size)
        base = table.pages[index - table.first_index] * page_size + offset
        slots.extend(range(base, base + stop - position))
        position = stop
    return slots


def filled_pages(chunk: ScheduledChunk, place: LayerPlace, page_size: int) -> list[tuple[int, int]]:
    """The pages that the chunk fills: in the recent pool, and in the quantized one."""
    assert place.recent is not None
    recent, quantized = chunk.tables[place.recent], chunk.tables[place.group]
    begin, end = chunk.start // page_size, (chunk.start + chunk.num_tokens) // page_size
    return [
        (recent.pages[k - recent.first_index], quantized.pages[k - quantized.first_index])
        for k in range(begin, end)
    ]


def segments(
    chunk: ScheduledChunk, place: LayerPlace, config: KVCacheConfig
) -> Iterator[tuple[int, int]]:
    """Runs of positions that read the same tokens from int4; of other kinds there is one."""
    start, end = chunk.start, chunk.start + chunk.num_tokens
    while place.recent is not None and start < end:
        # boundary(p) moves on where p + 1 - recent_window is the next multiple of a page.
        following = config.boundary(start) + config.page_size + config.recent_window - 1
        stop = min(end, following)
        yield start, stop
        start = stop
    if start < end:
        yield start, end


def _spans(
    chunk: ScheduledChunk,
    place: LayerPlace,
    config: KVCacheConfig,
    first: int,
    start: int,
    end: int,
) -> tuple[Span, ...]:
    if place.recent is None:
        return (_span(chunk.tables[place.group], first, end, config.page_size, recent=False),)
    boundary = max(first, config.boundary(start))
    spans = [_span(chunk.tables[place.recent], boundary, end, config.page_size, recent=True)]
    if first < boundary:
        quantized = chunk.tables[place.group]
        spans.insert(0, _span(quantized, first, boundary, config.page_size, recent=False))
    return tuple(spans)


def _span(table: PageTable, begin: int, end: int, page_size: int, *, recent: bool) -> Span:
    first, last = begin // page_size - table.first_index, -(-end // page_size) - table.first_index
    assert first >= 0 and last <= len(table.pages), "a page that is read is not held"
    pages = table.pages[first:last]
    offset = begin % page_size
    if pages == tuple(range(pages[0], pages[0] + len(pages))):
        return Span(recent, end - begin, pages[0] * page_size + offset)
    return Span(recent, end - begin, pages=torch.tensor(pages), offset=offset)
