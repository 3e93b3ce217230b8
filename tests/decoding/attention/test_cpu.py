"""The attention of a step over every kind of cache is what the cache's definition says."""

import pytest
import torch
from decoding.slow_attention import slow_attention
from decoding.stepping import Book

from llmopt.decoding.attention.cpu import CpuAttention
from llmopt.decoding.attention.hook import Call
from llmopt.decoding.kv.layers import AttentionLayer
from llmopt.decoding.kv.layout import PoolLimits, page_groups, place_layers
from llmopt.decoding.kv.store import KVStore
from llmopt.decoding.kv_cache_config import HeadScales, KVCacheConfig
from llmopt.decoding.scheduler import ScheduledChunk, ScheduledStep
from llmopt.decoding.sequence import Request, Sequence

HEADS, KV_HEADS, CHANNELS, SCALE = 6, 2, 8, 0.4
LENGTHS = [131, 17, 70]
SCALES = HeadScales(k=(0.01, 0.02), v=(0.5, 0.004))


def tensors(length, seed, channels=CHANNELS):
    """Random q, k and v; keys have a strong channel, values a strong token."""
    drawn = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, length, channels, generator=drawn)
    k = torch.randn(KV_HEADS, length, channels, generator=drawn)
    v = torch.randn(KV_HEADS, length, channels, generator=drawn)
    k[..., 3] += 4
    v[:, 5] *= 5
    return q, k, v


def attend(
    config, problems, chunk, *, window=None, shuffled=False, attention=CpuAttention, scale=SCALE,
    **options,
):  # fmt: skip
    """Outputs of every sequence, chunk by chunk, all sequences in one step."""
    q = problems[0][0]
    layer = AttentionLayer(0, HEADS, KV_HEADS, q.shape[-1], window)
    places = place_layers([layer], config)
    groups = page_groups(places, config, q.dtype, PoolLimits(num_pages=20))
    store = KVStore(places, groups, config, q.dtype)
    if attention is CpuAttention:
        poison(store)  # the kernels' references read what they mask
    book = Book(groups, config.page_size, shuffled)
    sequences = [
        Sequence(Request(str(i), (1,), 1), i, i, token_ids=[1] * q.shape[1])
        for i, (q, _, _) in enumerate(problems)
    ]
    outs = [[] for _ in problems]
    while running := [s for s in sequences if s.num_uncomputed_tokens]:
        chunks, parts = [], []
        for s in running:
            start, count = s.num_computed_tokens, min(chunk, s.num_uncomputed_tokens)
            tables = book.tables(s, start, start + count)
            chunks.append(ScheduledChunk(s, start, count, tables))
            parts.append([x[:, start : start + count] for x in problems[s.sequence_id]])
        q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        call = Call(0, q, k, v, scale, options.get("softcap"), options.get("sinks"), window)
        out = attention(store, ScheduledStep(tuple(chunks), ()))(call)
        for c in chunks:
            outs[c.sequence.sequence_id].append(out[: c.num_tokens])
            out = out[c.num_tokens :]
            c.sequence.num_computed_tokens += c.num_tokens
    return [torch.cat(out) for out in outs], store, book


def poison(store):
    """NaN wherever nothing was written: a token that nobody wrote must not be read."""
    for layer in store.layers.values():
        for pool in (layer.pool, layer.recent):
            for part in pool.pages.tensors().values() if pool else ():
                if part is not None and part.dtype == torch.float32 and part.dim() > 1:
                    part.fill_(torch.nan)


WAYS = [(1, False), (7, True), (64, False), (200, True)]
OPTIONS = [
    {},
    {"window": 9},
    {"window": 40},
    {"softcap": 1.5},
    {"window": 40, "softcap": 1.5, "sinks": torch.linspace(-1, 1, HEADS)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["auto", "fp8", "int8", "int4"])
def test_every_kind_reads_what_its_definition_says(kind, options):
    scales = {0: SCALES} if kind == "fp8" else None
    config = KVCacheConfig(kind, page_size=16, recent_window=20, fp8_scales=scales)
    problems = [tensors(length, seed) for seed, length in enumerate(LENGTHS)]
    given = {"k_scale": SCALES.k, "v_scale": SCALES.v} if kind == "fp8" else {}
    expected = [
        slow_attention(*p, kind=kind, recent=20, scale=SCALE, **options, **given) for p in problems
    ]
    for chunk, shuffled in WAYS:
        outs, _, _ = attend(config, problems, chunk, shuffled=shuffled, **options)
        for got, want in zip(outs, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_cache_of_fewer_bits_says_something_else():
    problems = [tensors(131, 0)]
    outs = {
        kind: attend(KVCacheConfig(kind, page_size=16, recent_window=20), problems, 64)[0][0]
        for kind in ("auto", "fp8", "int8", "int4")
    }
    errors = {kind: float((out - outs["auto"]).abs().mean()) for kind, out in outs.items()}
    assert 0 == errors["auto"] < errors["int8"] < min(errors["fp8"], errors["int4"])
    assert max(errors.values()) < 0.1
    # Until the window is left behind, int4 is exact.
    assert torch.equal(outs["int4"][:20], outs["auto"][:20])


@pytest.mark.parametrize(("kind", "group"), [("auto", "window-9"), ("int4", "recent")])
def test_pages_that_leave_the_window_are_given_back(kind, group):
    config = KVCacheConfig(kind, page_size=16, recent_window=9)
    window = 9 if kind == "auto" else None
    _, _, book = attend(config, [tensors(131, 0)], 1, window=window)
    assert book.most_held[group] == 2
    assert book.most_held.get("full", 8) == 8


@pytest.mark.parametrize(("kind", "at_most"), [("int8", 0.55), ("int4", 0.32), ("fp8", 0.51)])
def test_memory_of_the_pools_at_4k_context(kind, at_most):
    layer = AttentionLayer(0, 16, 8, 64, None)

    def num_bytes(kind):
        config = KVCacheConfig(kind)
        places = place_layers([layer], config)
        groups = page_groups(places, config, torch.bfloat16, PoolLimits(num_pages=4096 // 64))
        return KVStore(places, groups, config, torch.bfloat16).num_bytes("full")

    assert num_bytes("bf16") == 4096 * 8 * 64 * 2 * 2
    assert num_bytes(kind) / num_bytes("bf16") <= at_most
