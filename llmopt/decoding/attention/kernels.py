"""Attention of one step by the operations of ``llmopt_kernels``.

On a GPU these are kernels, elsewhere their torch references, which tests use. A step of single
tokens goes through ``attention_decode``, any other through ``attention_prefill_paged``. Queries
over an int4 cache always go through the former, which joins int4 pages with 16-bit ones: those of
one chunk that read different tokens from int4 are sequences of their own there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llmopt.decoding.attention.hook import Call
from llmopt.decoding.attention.step import chunk_rows, filled_pages, segments, slots_of
from llmopt.decoding.kv.layout import LayerPlace
from llmopt.decoding.kv.store import KVStore, LayerPools
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.paging.groups import PageTable
from llmopt.decoding.scheduler import ScheduledChunk
from llmopt_kernels import (
    attention_decode,
    attention_prefill_paged,
    kv_cache_write,
    kv_page_quantize,
)

PlaceKey = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Padding:
    """Shapes that do not change between steps, so that one captured graph serves them all.

    Attributes:
        num_rows: tokens, one a sequence; rows behind the step's are written nowhere and see
            nothing.
        num_pages: width of the block tables.
        recent_pages: of those of recent pages.
    """

    num_rows: int
    num_pages: int
    recent_pages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What layers in one place need to know of a step; "sequences" may be parts of chunks.

    Attributes:
        num_queries: a sequence, of ``attention_decode``; 0 asks for ``attention_prefill_paged``.
        max_queries: of any sequence.
        max_tokens: that a sequence reads.
        slots: ``(tokens,) int64`` where they are written.
        table: ``(sequences, pages) int32``.
        lengths: ``(sequences,) int32`` tokens in the pool.
        starts: ``(sequences + 1,) int32`` first rows, of the prefill.
        recent_table: ``(sequences, pages) int32``, of int4.
        recent_lengths: ``(sequences,) int32``, of int4.
        sources: ``(n,) int64`` recent pages that the step fills, of int4.
        targets: ``(n,) int64`` int4 pages that they become.
        gathered: ``(sequences * num_queries,) int64``, the row of each query; None: as they are.
        kept: ``(tokens,) int64``, the query of each row.
    """

    num_queries: int
    max_queries: int
    max_tokens: int
    slots: Tensor
    table: Tensor
    lengths: Tensor
    starts: Tensor
    recent_table: Tensor | None = None
    recent_lengths: Tensor | None = None
    sources: Tensor | None = None
    targets: Tensor | None = None
    gathered: Tensor | None = None
    kept: Tensor | None = None

    def to(self, device: torch.device) -> Plan:
        """The same on ``device``."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in self.tensors().items()}
        return replace(self, **moved)

    def copy_from(self, other: Plan) -> None:
        """Take another plan's numbers; the shapes are equal."""
        mine = self.tensors()
        for name, part in other.tensors().items():
            mine[name].copy_(part, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


class KernelAttention:
    """Answers the layers of one forward.

    Args:
        store: the pools.
        plans: of every place (``plan_step``), on the pools' device.
    """

    def __init__(self, store: KVStore, plans: Mapping[PlaceKey, Plan]) -> None:
        self._store = store
        self._plans = plans

    def __call__(self, call: Call) -> Tensor:
        """Write the new tokens, then attend: ``(tokens, heads, head_dim)``."""
        layer = self._store.layers[call.layer]
        plan = self._plans[layer.place.group, layer.place.recent]
        q, k, v = (x.transpose(0, 1) for x in (call.q, call.k, call.v))
        kv_cache_write(k, v, plan.slots, layer.written.pages)
        if layer.recent is not None and plan.sources is not None and plan.targets is not None:
            source, target = layer.recent.pages, layer.pool.pages
            kv_page_quantize(source, plan.sources, target, plan.targets)
        if plan.num_queries:
            return _decode(call, layer, plan, q)
        out = attention_prefill_paged(
            q,
            layer.pool.pages,
            plan.table,
            plan.starts,
            plan.lengths,
            plan.max_queries,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
            scale=call.scale,
        )
        assert isinstance(out, Tensor)
        return out


def _decode(call: Call, layer: LayerPools, plan: Plan, q: Tensor) -> Tensor:
    out = attention_decode(
        q if plan.gathered is None else q[plan.gathered],
        layer.pool.pages,
        plan.table,
        plan.lengths,
        max_kv_length=plan.max_tokens,
        num_queries=plan.num_queries,
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        scale=call.scale,
        recent=None if layer.recent is None else layer.recent.pages,
        recent_block_table=plan.recent_table,
        recent_lengths=plan.recent_lengths,
    )
    assert isinstance(out, Tensor)
    return out if plan.kept is None else out[plan.kept]


def plan_step(
    chunks: Sequence[ScheduledChunk], store: KVStore, padding: Padding | None = None
) -> dict[PlaceKey, Plan]:
    """The plans of every place, on the CPU.

    Args:
        chunks: of the step; with ``padding`` of one token each, and no more than it has rows.
        store: the pools.
        padding: shapes to fill up to.
    """
    plans: dict[PlaceKey, Plan] = {}
    for layer in store.layers.values():
        place = layer.place
        key = place.group, place.recent
        if key not in plans:
            make = _plan if place.recent is None else _plan_int4
            plans[key] = make(chunks, place, store.config, padding)
    return plans


def _plan(
    chunks: Sequence[ScheduledChunk],
    place: LayerPlace,
    config: KVCacheConfig,
    padding: Padding | None,
) -> Plan:
    page = config.page_size
    ends = [chunk.start + chunk.num_tokens for chunk in chunks]
    rows = 0 if padding is None else padding.num_rows
    slots = [slot for chunk in chunks for slot in slots_of(chunk, place.group, page)]
    tables = [
        _from_zero(chunk.tables[place.group], end, page)
        for chunk, end in zip(chunks, ends, strict=True)
    ]
    decodes = all(chunk.num_tokens == 1 for chunk in chunks)
    return Plan(
        num_queries=int(decodes),
        max_queries=max((chunk.num_tokens for chunk in chunks), default=1),
        max_tokens=max(ends) if padding is None else padding.num_pages * page,
        slots=_numbers(slots, rows, -1, torch.int64),
        table=_table(tables, rows, None if padding is None else padding.num_pages),
        lengths=_numbers(ends, rows, 0),
        starts=_numbers([0, *(rows.stop for rows in chunk_rows(chunks))], rows + 1, len(slots)),
    )


def _plan_int4(
    chunks: Sequence[ScheduledChunk],
    place: LayerPlace,
    config: KVCacheConfig,
    padding: Padding | None,
) -> Plan:
    assert place.recent is not None
    page = config.page_size
    rows = 0 if padding is None else padding.num_rows
    parts = [
        (chunk, start, end, rows.start + end - chunk.start)
        for chunk, rows in zip(chunks, chunk_rows(chunks), strict=True)
        for start, end in segments(chunk, place, config)
    ]
    boundaries = [config.boundary(start) for _, start, _, _ in parts]
    recent_tables = [
        _from(chunk.tables[place.recent], boundary, end, page)
        for (chunk, _, end, _), boundary in zip(parts, boundaries, strict=True)
    ]
    tables = [
        _from_zero(chunk.tables[place.group], boundary, page)
        for (chunk, *_), boundary in zip(parts, boundaries, strict=True)
    ]
    filled = [pair for chunk in chunks for pair in filled_pages(chunk, place, page)]
    queries = max((end - start for _, start, end, _ in parts), default=1)
    gathered = kept = None
    if queries > 1:
        # A part with fewer queries gets those before it too; nobody looks at their outputs.
        of_part = [range(stop - queries, stop) for *_, stop in parts]
        gathered = _numbers([max(0, row) for r in of_part for row in r], dtype=torch.int64)
        kept = _numbers(
            [
                (index + 1) * queries - end + position
                for index, (_, start, end, _) in enumerate(parts)
                for position in range(start, end)
            ],
            dtype=torch.int64,
        )
    slots = [slot for chunk in chunks for slot in slots_of(chunk, place.recent, page)]
    lengths = [end - b for (_, _, end, _), b in zip(parts, boundaries, strict=True)]
    longest = max((end for _, _, end, _ in parts), default=1)
    return Plan(
        num_queries=queries,
        max_queries=queries,
        max_tokens=longest if padding is None else padding.num_pages * page,
        slots=_numbers(slots, rows, -1, torch.int64),
        table=_table(tables, rows, None if padding is None else padding.num_pages),
        lengths=_numbers(boundaries, rows, 0),
        starts=_numbers([], rows + 1, 0),
        recent_table=_table(recent_tables, rows, None if padding is None else padding.recent_pages),
        recent_lengths=_numbers(lengths, rows, 0),
        sources=_numbers([source for source, _ in filled], rows, -1, torch.int64),
        targets=_numbers([target for _, target in filled], rows, -1, torch.int64),
        gathered=gathered,
        kept=kept,
    )


def _from_zero(table: PageTable, end: int, page_size: int) -> tuple[int, ...]:
    """Pages of the tokens 0 to ``end``; page 0 stands for those that the window left behind."""
    pages = (0,) * table.first_index + table.pages
    return pages[: -(-end // page_size)]


def _from(table: PageTable, begin: int, end: int, page_size: int) -> tuple[int, ...]:
    first = begin // page_size - table.first_index
    return table.pages[first : -(-end // page_size) - table.first_index]


def _numbers(
    values: Sequence[int], length: int = 0, fill: int = 0, dtype: torch.dtype = torch.int32
) -> Tensor:
    return torch.tensor([*values, *[fill] * (length - len(values))], dtype=dtype)


def _table(tables: Sequence[tuple[int, ...]], rows: int, width: int | None) -> Tensor:
    width = max((len(pages) for pages in tables), default=0) if width is None else width
    full = [[*pages, *[0] * (width - len(pages))] for pages in tables]
    full += [[0] * width] * (rows - len(full))
    return torch.tensor(full, dtype=torch.int32).view(len(full), max(width, 1) if width else 0)
