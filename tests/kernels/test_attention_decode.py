"""attention_decode against its float64 reference."""

import dataclasses
import importlib
import math
from contextlib import contextmanager

import pytest
import torch
from support.comparing import TOLERANCE, relative_error
from support.decode_problems import CONFIG, LOOSER, hold, problem
from support.far_apart import far_apart
from support.paged_stores import moved

from llmopt_kernels.attention_decode import (
    attention_decode,
    attention_decode_reference,
    choose_num_splits,
    launch_attention_decode,
)
from llmopt_kernels.attention_decode_config import DecodeConfig, candidate_configs, shipped_config
from llmopt_kernels.decode_problem import CachedTokens, pack_tree_mask
from llmopt_kernels.paged_kv import HEAD_DIMS, PAGE_SIZES, new_cache

KINDS = ("16-bit", "fp8", "int8", "int4")


@contextmanager
def compiling_nothing():
    """Launchers called inside launch nothing, for no chip; gives what they would have."""
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("llmopt_kernels.attention_decode")
        patch.setattr(module, "architecture", lambda _: 90)
        for name in ("attention_decode", "attention_merge"):
            module = importlib.import_module(f"llmopt_kernels.{name}")
            patch.setattr(module, "launch", lambda *given, **_: launches.append(given))
        yield launches


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_head_dimension(kind, head_dim, device):
    hold(problem((33, 0), kind, head_dim=head_dim, device=device))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_page_size_at_its_borders(kind, page_size, device):
    lengths = (page_size - 1, page_size, page_size + 1)
    made = problem(lengths, kind, page_size, 4, 2, device=device, dtype=torch.float16)
    hold(made, 1, DecodeConfig(min(page_size, 64) if kind == "int4" else 64, 4, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_several_pages(kind, device):
    hold(
        problem((70, 31), kind, 16, q_heads=4, kv_heads=2, device=device),
        config=DecodeConfig(64, 4, 2),
    )


@pytest.mark.parametrize("num_splits", [1, 3, 17, None])
def test_every_number_of_splits_gives_the_same(num_splits, device):
    hold(problem((100, 33, 0, 1), device=device, sinks=True), num_splits)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "num_queries"),
    [(1, 1, 1), (5, 1, 3), (6, 2, 1), (3, 3, 2), (6, 2, 19), (1, 1, 65)],
)
def test_groups_and_queries_are_rows(q_heads, kv_heads, num_queries, device):
    made = problem(
        (40, 2), q_heads=q_heads, kv_heads=kv_heads, num_queries=num_queries, device=device
    )
    hold(made)


@pytest.mark.parametrize("options", [{}, {"window": 24}])
@pytest.mark.parametrize("num_queries", [1, 5, 24])
def test_a_tree_sees_ancestors_alone(num_queries, options, device):
    lengths = (45, 24, 30, 0, 3)  # the last is shorter than its tree
    hold(problem(lengths, num_queries=num_queries, tree=True, device=device, **options))


def test_a_tree_of_all_64_bits(device):
    hold(problem((64, 70), num_queries=64, q_heads=1, tree=True, device=device))


def test_a_tree_that_is_a_chain_is_the_chain(device):
    chain = problem((40, 9), num_queries=7, device=device)
    mask = torch.ones(2, 7, 7, dtype=torch.bool, device=device).tril()
    tree = dataclasses.replace(chain, tree_mask=pack_tree_mask(mask))
    for found, expected in zip(hold(tree), hold(chain), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("window", "num_queries"), [(1, 1), (1, 4), (16, 4), (33, 1), (1000, 1)])
def test_a_window_does_not_read_what_it_has_left(window, num_queries, device):
    made = problem((70, 100, 3, 0), window=window, num_queries=num_queries, device=device)
    expected, _ = attention_decode_reference(made)
    store = made.stores[0]
    for row, length in enumerate((70, 100)):
        left = max(0, length - num_queries - window + 1) // store.cache.page_size
        gone = store.block_table[row, :left]
        store.cache.k[gone.long()] = float("nan")
        store.cache.v[gone.long()] = float("nan")
        store.block_table[row, :left] = 1 << 20
    out, _ = launch_attention_decode(made, 2, CONFIG)
    assert relative_error(out, expected) <= LOOSER * TOLERANCE[made.q.dtype]


@pytest.mark.parametrize("options", [{"sinks": True}, {"softcap": 3.0}, {"window": 20}])
@pytest.mark.parametrize("kind", ["16-bit", "fp8", "int8"])
def test_options_in_float16(options, kind, device):
    made = problem((50, 0), kind, dtype=torch.float16, device=device, num_queries=2, **options)
    hold(made)


@pytest.mark.parametrize("kind", ["int4", "16-bit"])
@pytest.mark.parametrize(
    "options",
    [{"sinks": True}, {"window": 25}, {"window": 9, "tree": True}],
)
def test_recent_tokens_follow_the_others(kind, options, device):
    # Queries in the second store, across both, in the first, an empty first, nothing.
    made = problem(
        (32, 40, 16, 0, 0), kind, recent=(17, 3, 0, 9, 0), num_queries=6, device=device, **options
    )
    hold(made)


def test_keys_and_values_interleaved_as_vllm_has_them(device):
    made = problem((50, 17, 0), interleaved=True, device=device)
    assert made.stores[0].cache.k.stride() != new_cache("16-bit", 6, 16, 2, 64).k.stride()
    hold(made)


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's, of a tile that is NaN
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_is_passed_on(name, device):
    made = problem((40, 40), q_heads=1, device=device)
    store = made.stores[0]
    if name == "q":
        made.q[1, 0, 3] = math.nan
    else:
        getattr(store.cache, name)[store.block_table[1, 0].long(), 2, 0, 3] = math.nan
    out, lse = launch_attention_decode(made, 2, CONFIG)
    assert not out[0].isnan().any() and out[1, 0, 3].isnan()
    assert bool(lse[1].isnan().all()) == (name != "v")


def test_small_scales_of_int8_values_do_not_underflow(device):
    made = problem((300,), "int8", dtype=torch.float16, device=device)
    made.stores[0].cache.v_scale.mul_(1e-3)
    hold(made)


@pytest.mark.parametrize("num_queries", [3, 24])
def test_tokens_of_a_tree_that_nobody_sees_may_be_nan(num_queries, device):
    made = problem((45, 40), num_queries=num_queries, tree=True, device=device)
    made.tree_mask[:, -1] = 0
    made.tree_mask.bitwise_and_((1 << num_queries - 1) - 1)
    store = made.stores[0]
    for row, length in enumerate((45, 40)):
        page = store.block_table[row, (length - 1) // 16].long()
        store.cache.v[page, (length - 1) % 16] = math.nan
    hold(made)


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("dim", [-3, -2], ids=["tokens", "heads"])
def test_queries_beyond_32_bits(dim, device):
    made = problem((20, 9, 0), q_heads=3, device=device)
    (q,) = far_apart([made.q], dim)
    hold(dataclasses.replace(made, q=q))


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("kind", ["16-bit", "int8", "int4"])
@pytest.mark.parametrize("dim", [-4, -3, -2], ids=["pages", "tokens", "heads"])
def test_a_cache_beyond_32_bits(dim, kind, device):
    made = problem((40, 9), kind, q_heads=3, kv_heads=3, device=device)
    store = made.stores[0]
    k, v = far_apart([store.cache.k, store.cache.v], dim)
    cache = dataclasses.replace(store.cache, k=k, v=v)
    hold(dataclasses.replace(made, stores=(dataclasses.replace(store, cache=cache),)))


def test_many_sequences_are_on_the_first_axis_of_the_grid():
    made = moved(problem((1,) * 4), "meta")
    with compiling_nothing() as launches:
        launch_attention_decode(made, 2)
    assert launches[0][1] == (4, 2)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the most is 1073741824"):
        call(problem(), window=2**31 - 1)
    made = problem()
    made.stores[0].lengths[1] = -1
    with pytest.raises(ValueError, match=r"kv_lengths\[1\] is -1"):
        launch_attention_decode(made, check_values=True)


def test_no_sequences(device):
    made = problem((1,), device=device)
    store = made.stores[0]
    none = CachedTokens(store.cache, store.block_table[:0], store.lengths[:0])
    out, lse = launch_attention_decode(dataclasses.replace(made, q=made.q[:0], stores=(none,)))
    assert out.shape == (0, 2, 64) and lse.shape == (0, 2)


def test_no_pages_at_all(device):
    made = problem((0, 0), device=device)
    store = dataclasses.replace(made.stores[0], block_table=made.stores[0].block_table[:, :0])
    out, lse = launch_attention_decode(dataclasses.replace(made, stores=(store,)))
    assert not out.any() and bool((lse == -math.inf).all())


def call(made, **changes):
    store = made.stores[0]
    given = {
        "q": made.q,
        "cache": store.cache,
        "block_table": store.block_table,
        "kv_lengths": store.lengths,
        "max_kv_length": made.max_kv_length,
        **changes,
    }
    return attention_decode(**given)


def test_the_operation_gives_output_and_lse(device):
    made = problem(device=device)
    out, lse = call(made, return_lse=True)
    expected, expected_lse = attention_decode_reference(made)
    assert out.dtype == made.q.dtype and lse.dtype == torch.float32
    assert relative_error(out, expected) <= LOOSER * TOLERANCE[made.q.dtype]
    seen = expected_lse > -math.inf
    assert relative_error(lse[seen], expected_lse[seen]) <= TOLERANCE[torch.float16]
    assert torch.equal(call(made), out)


def test_it_reads_no_values_before_it_launches():
    made = moved(problem((50, 17), "int4", recent=(3, 4), num_queries=2, tree=True), "meta")
    with compiling_nothing() as launches:
        launch_attention_decode(made)
    assert len(launches) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(4, 4, 64)}, "q is float32; use bfloat16, float16"),
        ({"q": torch.zeros(4, 4, 64, dtype=torch.float16)}, "cache is bfloat16; use float16"),
        ({"q": torch.zeros(4, 4, 80).bfloat16()}, "2 kv heads of 64 channels; expected 2 of 80"),
        ({"q": torch.zeros(4, 3, 64).bfloat16()}, "3 query heads do not share 2 kv heads"),
        ({"q": torch.zeros(5, 4, 64).bfloat16()}, "q has 5 tokens; 4 sequences of 1 queries"),
        ({"q": torch.zeros(4, 64, 4).bfloat16().mT}, "q has stride 4 in its last dimension"),
        ({"kv_lengths": torch.zeros(4)}, "kv_lengths is float32; use int32"),
        ({"kv_lengths": torch.zeros(3, dtype=torch.int32)}, r"block_table has shape \[4, 3\]"),
        ({"block_table": torch.zeros(4, 3)}, "block_table is float32; use int32"),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32).mT}, "block_table has stride 4"),
        ({"window": 0}, "window is 0; it must be positive"),
        ({"softcap": -1.0}, "softcap is -1.0; it must be positive"),
        ({"scale": 0.0}, "scale is 0.0; it must be positive"),
        ({"max_kv_length": -1}, "max_kv_length is -1"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\]; expected \[4\]"),
        ({"tree_mask": torch.zeros(4, 1)}, "tree_mask is float32; use int64"),
        ({"recent": new_cache("16-bit", 1, 16, 2, 64)}, "recent_lengths go together"),
        ({"num_queries": 0}, "4 sequences of 0 queries"),
        (
            {
                "recent": new_cache("int8", 1, 16, 2, 64),
                "recent_block_table": torch.zeros(4, 1, dtype=torch.int32),
                "recent_lengths": torch.zeros(4, dtype=torch.int32),
            },
            "recent is int8; it must be 16-bit",
        ),
        (
            {
                "recent": new_cache("16-bit", 1, 16, 1, 64),
                "recent_block_table": torch.zeros(4, 1, dtype=torch.int32),
                "recent_lengths": torch.zeros(4, dtype=torch.int32),
            },
            "recent_cache has 1 kv heads of 64 channels; expected 2 of 64",
        ),
        (
            {"check_values": True, "block_table": torch.full((4, 3), 99, dtype=torch.int32)},
            r"block table \[0, 0\] is 99; the pool has 8 pages",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        call(problem(q_heads=4, kv_heads=2), **changes)


def test_a_tree_that_does_not_fit_is_refused():
    made = problem((70,), num_queries=65)
    with pytest.raises(ValueError, match="a tree of 65 tokens; the most is 64"):
        call(made, num_queries=65, tree_mask=torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="a tree of 65 tokens; the most is 64"):
        pack_tree_mask(torch.ones(1, 65, 65))
    with pytest.raises(ValueError, match="window is 3 and the tree has 65 tokens|a tree of 65"):
        call(made, num_queries=65, window=3, tree_mask=torch.zeros(1, 65, dtype=torch.int64))
    made = problem((70,), num_queries=4)
    with pytest.raises(ValueError, match="window is 3 and the tree has 4 tokens"):
        call(made, num_queries=4, window=3, tree_mask=torch.zeros(1, 4, dtype=torch.int64))
    strided = torch.zeros(1, 8, dtype=torch.int64)[:, ::2]
    with pytest.raises(ValueError, match="tree_mask has strides"):
        call(made, num_queries=4, tree_mask=strided)


def test_values_that_cannot_be_read_by_pairs_are_refused():
    made = problem(kind="int8")
    cache = made.stores[0].cache
    wider = torch.zeros(*cache.v.shape[:3], 65, dtype=torch.int8)
    for v in (wider[..., :64], wider.flatten()[1 : 1 + cache.v.numel()].view(cache.v.shape)):
        with pytest.raises(ValueError, match="they must be even, to read by pairs"):
            call(made, cache=dataclasses.replace(cache, v=v))


def test_num_splits_out_of_range_is_refused(device):
    with pytest.raises(ValueError, match="num_splits is 0; use 1 to 256"):
        launch_attention_decode(problem(device=device), 0)


def test_splits_fill_the_multiprocessors_and_are_not_too_short():
    assert choose_num_splits(64, 8, 1, 8192, 132) == 3
    assert choose_num_splits(1, 8, 1, 8192, 132) == 32
    assert choose_num_splits(1, 8, 1, 100, 132) == 1
    assert choose_num_splits(1, 1, 1, 10**7, 132) == 256
    assert choose_num_splits(1, 8, 2, 8192, 132) == 8
    assert choose_num_splits(1, 8, 1, 0, 132) == 1


@pytest.mark.parametrize("chip", [80, 90, "gfx942"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_int4_tiles_lie_within_pages(page_size, chip):
    for head_dim in HEAD_DIMS:
        shipped = shipped_config("int4", head_dim, page_size, 16, chip)
        candidates = list(candidate_configs("int4", head_dim, page_size, 16))
        assert all(c.block_n <= page_size for c in [shipped, *candidates])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_real_shapes(kind, head_dim, num_queries, device):
    lengths = (8192, 4097, 1, 0, 5000)
    made = problem(
        lengths, kind, 64, 32, 8, head_dim, num_queries=num_queries, tree=True, device=device
    )
    hold(made, None, None)
