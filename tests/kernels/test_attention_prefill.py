"""attention_prefill against its float64 reference, and that against torch's own attention."""

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from support.comparing import TOLERANCE, relative_error
from support.far_apart import far_apart
from support.prefill_problems import (
    SMALL,
    TALL,
    WIDE,
    bounds,
    check,
    launched,
    packed,
    paged,
)

from llmopt_kernels.attention_prefill import (
    attention_prefill,
    attention_prefill_paged,
    attention_prefill_reference,
    candidate_configs,
    launch_attention_prefill,
    shipped_config,
)
from llmopt_kernels.paged_kv import HEAD_DIMS, new_cache
from llmopt_kernels.prefill_problem import PackedTokens


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(d, torch.bfloat16) for d in HEAD_DIMS] + [(d, torch.float16) for d in (80, 128)],
)
def test_every_head_dimension(head_dim, dtype, device):
    lengths = [(18, 35), (1, 1)]
    check(packed(device, lengths, (1, 1), head_dim, dtype))


@pytest.mark.parametrize("config", [WIDE, TALL])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 1},
        {"window": 7, "sinks": True},
        {"window": 1000},
        {"softcap": 0.8, "sinks": True},
        {"causal": False, "softcap": 0.8, "scale": 2.0},
    ],
    ids=str,
)
def test_every_option(options, config, device):
    check(packed(device, **options), config)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)])
def test_heads_share_keys(heads, device):
    check(packed(device, [(17, 17), (2, 20)], heads))


def test_values_may_have_other_strides_than_keys(device):
    lengths = [(18, 35)]
    problem = packed(device, lengths)
    other = PackedTokens(problem.kv.k, problem.kv.v.contiguous(), problem.kv.cu_seqlens)
    check(replace(problem, kv=other))
    problem = paged(device, lengths=lengths)
    by_head = problem.kv.cache.v.transpose(1, 2).contiguous().transpose(1, 2)
    check(replace(problem, kv=replace(problem.kv, cache=replace(problem.kv.cache, v=by_head))))


def test_large_scores_neither_overflow_nor_cancel(device):
    for softcap in (None, 50.0):
        for scale in (40.0, 1e-4):
            check(packed(device, [(5, 33)], (1, 1), scale=scale, softcap=softcap))


def test_a_sink_far_above_the_scores_keeps_the_precision_of_a_small_output(device):
    for dtype in (torch.bfloat16, torch.float16):
        problem = packed(device, [(5, 20)], dtype=dtype)
        # From about 8 on an output of fp16 is subnormal.
        check(replace(problem, sinks=torch.tensor([7.0, -1e30], device=device)))


@pytest.mark.parametrize("kind", ["16-bit", "fp8", "int8", "int4"])
@pytest.mark.parametrize("page_size", [16, 32])
def test_every_kind_of_cache(kind, page_size, device):
    check(paged(device, kind, page_size, heads=(1, 1)))
    check(paged(device, kind, page_size, [(18, 53)], window=9), TALL)


@pytest.mark.parametrize("kind", ["16-bit", "int4"])
@pytest.mark.parametrize("head_dim", [80, 96, 192])
def test_odd_head_dimensions_of_a_cache(kind, head_dim, device):
    check(paged(device, kind, lengths=[(9, 20)], head_dim=head_dim, dtype=torch.float16))


@pytest.mark.parametrize("page_size", [16, 128])
def test_options_hold_for_a_cache(page_size, device):
    lengths, heads = [(5, 20), (18, 18)], (4, 2)
    check(paged(device, "int8", page_size, lengths, heads, causal=False, sinks=True))
    check(paged(device, "fp8", page_size, lengths, heads, softcap=0.8))
    check(paged(device, "16-bit", page_size, lengths, heads, window=18, interleaved=True))


def test_small_scales_of_int8_values_do_not_underflow(device):
    problem = paged(device, "int8", dtype=torch.float16)
    problem.kv.cache.v_scale.mul_(1e-2)
    check(problem)


def test_pages_before_the_window_may_be_gone(device):
    problem = paged(device, lengths=[(10, 90)], window=20)
    expected, _ = attention_prefill_reference(problem)
    problem.kv.block_table[0, :3] = -(2**20)  # the first query, at 80, sees keys from 61 on
    for config in (SMALL, TALL):
        out, _ = launched(problem, False, config)
        assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("make", [packed, paged])
def test_nan_is_passed_on(make, softcap, device):
    lengths = [(3, 3), (20, 20)]
    for name in ("q", "k", "v"):
        problem = make(device, lengths=lengths, softcap=softcap)
        if name == "q":
            problem.q[5, 0, 3] = math.nan  # query 2 of the second sequence
        elif make is packed:
            getattr(problem.kv, name)[5, 0, 3] = math.nan
        else:
            page = problem.kv.block_table[1, 0]
            getattr(problem.kv.cache, name)[page, 2, 0, 3] = math.nan
        out, lse = launched(problem, True, SMALL)
        lost = out.isnan().cpu()
        expected = torch.zeros_like(lost)
        if name == "q":
            expected[5, 0] = True
        elif name == "k":
            expected[5:] = True
        else:  # to a query of the same tile that does not see it, 0 times NaN is NaN too
            expected[5:, :, 3] = True
            lost[3:5, :, 3] = False
        assert torch.equal(lost, expected)
        assert torch.equal(lse.T.isnan().cpu(), expected.all(-1))


@pytest.mark.parametrize("window", [2**30 - 1, 2**31 - 1, 2**40])
def test_a_window_beyond_every_key_does_not_wrap(window, device):
    problem = packed(device, [(18, 5), (3, 20)], window=window)
    check(problem)
    whole, _ = launched(replace(problem, window=None), False, SMALL)
    out, _ = launched(problem, False, SMALL)
    torch.testing.assert_close(out, whole, rtol=0.0, atol=1e-2)


def test_more_queries_than_q_has_may_be_provided_for(device):
    problem = packed(device, [(3, 3), (18, 20)])
    check(replace(problem, max_seqlen_q=1000))
    check(replace(problem, max_seqlen_q=2**40), None)


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize(
    ("lengths", "config"),
    # A tile that reaches beyond by itself, and one that only does from where it starts.
    [([(20, 20)], WIDE), ([(3, 3), (17, 17)], SMALL)],
)
@pytest.mark.parametrize("dim", [-3, -2], ids=["tokens", "heads"])
def test_indices_beyond_32_bits(dim, lengths, config, device):
    problem = packed(device, lengths, (3, 3))
    q, k, v = far_apart([problem.q, problem.kv.k, problem.kv.v], dim)
    check(replace(problem, q=q, kv=replace(problem.kv, k=k, v=v)), config)


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("kind", ["16-bit", "int4"])
@pytest.mark.parametrize("dim", [-4, -3, -2], ids=["pages", "tokens", "heads"])
def test_indices_beyond_32_bits_in_a_cache(dim, kind, device):
    problem = paged(device, kind, lengths=[(3, 20)], heads=(3, 3))
    k, v = far_apart([problem.kv.cache.k, problem.kv.cache.v], dim)
    check(replace(problem, kv=replace(problem.kv, cache=replace(problem.kv.cache, k=k, v=v))))


def test_nothing_to_do(device):
    for problem in (
        packed(device, [(0, 3)]),
        packed(device, [(0, 0), (0, 0)]),
        paged(device, lengths=[(0, 3)]),
    ):
        out, lse = launch_attention_prefill(problem, True)
        assert out.shape == problem.q.shape and lse.shape == (2, 0)


def test_the_order_of_programs_is_a_permutation(device, monkeypatch):
    # So little L2 that heads go in several rounds.
    module = import_module("llmopt_kernels.attention_prefill")
    monkeypatch.setattr(module, "L2_BYTES", 1)
    check(packed(device, [(35, 35), (17, 17)], (4, 2)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("architecture", [80, 86, 90, 120, "gfx942"])
def test_shipped_tiles_are_powers_of_two(head_dim, architecture):
    for kind in ("16-bit", "int8"):
        for tokens in (1, 5000):
            config = shipped_config(head_dim, tokens, kind, architecture)
            if architecture in (86, 120):  # 99 KiB of shared memory, of which a little is not tiles
                element_bytes = 2 if kind == "16-bit" else 1
                tile_bytes = 2 * head_dim * config.block_n * element_bytes
                assert config.num_stages * tile_bytes <= 97 * 2**10
            for size in (config.block_m, config.block_n):
                assert size >= 16 and size & (size - 1) == 0
    assert len(set(candidate_configs(head_dim))) == len(candidate_configs(head_dim))


def sdpa(q, k, v, causal):
    """One sequence by torch's attention, in float64."""
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_torchs_attention(causal):
    problem = packed("cpu", [(17, 17), (5, 5)], (4, 2), causal=causal)
    out, _ = attention_prefill_reference(problem)
    for part in (slice(0, 17), slice(17, 22)):
        expected = sdpa(problem.q[part], problem.kv.k[part], problem.kv.v[part], causal)
        assert relative_error(out[part], expected) <= 1e-12


def test_the_reference_of_a_chunk_is_the_end_of_the_whole():
    whole = packed("cpu", [(30, 30)], window=7, softcap=2.0, sinks=True)
    chunk = replace(whole, q=whole.q[20:], cu_seqlens_q=bounds([10], "cpu"), max_seqlen_q=10)
    out, lse = attention_prefill_reference(whole)
    out_chunk, lse_chunk = attention_prefill_reference(chunk)
    torch.testing.assert_close(out[20:], out_chunk)
    torch.testing.assert_close(lse[:, 20:], lse_chunk)


def test_the_operations_take_the_reference_on_a_cpu():
    p = packed("cpu", causal=False)
    arguments = p.q, p.kv.k, p.kv.v, p.cu_seqlens_q, p.kv.cu_seqlens, p.max_seqlen_q
    out, lse = attention_prefill(*arguments, causal=False, return_lse=True)
    expected, expected_lse = attention_prefill_reference(p)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(lse.double(), expected_lse)
    p = paged("cpu", "int8", window=7)
    arguments = p.q, p.kv.cache, p.kv.block_table, p.cu_seqlens_q, p.kv.lengths, p.max_seqlen_q
    out = attention_prefill_paged(*arguments, window=7, check_values=True)
    expected, _ = attention_prefill_reference(p)
    assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16]


INT = torch.int32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(4, 2, 64)}, "q is float32; use bfloat16, float16"),
        ({"q": torch.zeros(4, 64).half()}, r"q has shape \[4, 64\]"),
        ({"q": torch.zeros(4, 2, 72).half()}, "head dimension is 72; use one of 64"),
        ({"q": torch.zeros(4, 3, 64).half()}, "3 query heads do not share 2 kv heads"),
        ({"q": torch.zeros(4, 64, 2).half().mT}, "q has stride 2 in its last dimension"),
        ({"k": torch.zeros(4, 2, 80).half()}, r"k has shape \[4, 2, 80\]; expected \[\*, \*, 64\]"),
        ({"k": torch.zeros(4, 2, 64).bfloat16()}, "k is bfloat16; use float16"),
        ({"v": torch.zeros(5, 2, 64).half()}, r"v has shape \[5, 2, 64\]; expected \[4, 2, 64\]"),
        ({"cu_seqlens_q": torch.zeros(2)}, "cu_seqlens_q is float32; use int32"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=INT)}, "cu_seqlens_q is empty"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=INT)}, r"cu_seqlens_k has shape \[3\]"),
        ({"cu_seqlens_q": torch.zeros(4, dtype=INT)[::2]}, "cu_seqlens_q has stride 2"),
        ({"max_seqlen_q": -1}, "max_seqlen_q is -1; it must not be negative"),
        ({"max_seqlen_q": 3}, "max_seqlen_q is 3; a sequence has 4 queries"),
        ({"cu_seqlens_q": torch.tensor([0, 9], dtype=INT)}, r"cu_seqlens_q is \[0, 9\]; .* 4 tok"),
        ({"cu_seqlens_q": torch.tensor([1, 4], dtype=INT)}, r"cu_seqlens_q is \[1, 4\]"),
        ({"cu_seqlens_k": torch.tensor([0, -1], dtype=INT)}, r"cu_seqlens_k is \[0, -1\]"),
        ({"cu_seqlens_k": torch.tensor([0, 5], dtype=INT)}, r"cu_seqlens_k is \[0, 5\]; .* of k"),
        ({"window": 0}, "window is 0 and causal True"),
        ({"window": 3, "causal": False}, "window is 3 and causal False"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be positive"),
        ({"scale": -1.0}, "scale is -1.0; it must be positive"),
        ({"scale": math.nan}, "scale is nan"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\]; expected \[2\]"),
        ({"sinks": torch.zeros(2).double()}, "sinks is float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(changes, words):
    x = torch.zeros(4, 2, 64, dtype=torch.float16)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    given = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    with pytest.raises(ValueError, match=words):
        attention_prefill(**{**given, "max_seqlen_q": 4, **changes}, check_values=True)


def test_more_sequences_than_a_launch_takes_are_refused(device):
    problem = packed(device, [(1, 1)])
    many = torch.zeros(2**16 + 1, dtype=INT, device=device)
    problem = replace(problem, kv=replace(problem.kv, cu_seqlens=many), cu_seqlens_q=many)
    with pytest.raises(ValueError, match="65536 sequences; a launch takes 65535 at most"):
        launch_attention_prefill(problem)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(4, 2, 128).half()}, "the cache has head dimension 64, q 128"),
        ({"q": torch.zeros(4, 2, 64).bfloat16()}, "the cache's k is float16; use bfloat16"),
        ({"q": torch.zeros(4, 3, 64).half()}, "3 query heads do not share 2 kv heads"),
        ({"block_table": torch.zeros(2, 1, dtype=INT)}, r"block_table has shape \[2, 1\]"),
        ({"block_table": torch.zeros(1, 1).long()}, "block_table is int64"),
        ({"block_table": torch.zeros(1, 4, dtype=INT)[:, ::2]}, "block_table has stride 2"),
        ({"block_table": torch.full((1, 1), 7, dtype=INT)}, r"block table \[0, 0\] is 7"),
        ({"kv_lengths": torch.zeros(2, dtype=INT)}, r"kv_lengths has shape \[2\]"),
        ({"kv_lengths": torch.full((1,), 17, dtype=INT)}, "sequence 0 has 17 tokens"),
        ({"kv_lengths": torch.full((1,), -3, dtype=INT)}, r"kv_lengths\[0\] is -3"),
        ({"cu_seqlens_q": torch.tensor([0, 9], dtype=INT)}, r"cu_seqlens_q is \[0, 9\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cache_that_does_not_fit_is_refused(changes, words):
    given = {
        "q": torch.zeros(4, 2, 64, dtype=torch.float16),
        "cache": new_cache("16-bit", 3, 16, 2, 64, dtype=torch.float16),
        "block_table": torch.zeros(1, 1, dtype=INT),
        "cu_seqlens_q": torch.tensor([0, 4], dtype=INT),
        "kv_lengths": torch.tensor([4], dtype=INT),
    }
    with pytest.raises(ValueError, match=words):
        attention_prefill_paged(**{**given, "max_seqlen_q": 4, **changes}, check_values=True)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")


@needs_gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_real_shapes(head_dim, device):
    for options in ({}, {"window": 1000, "sinks": True}, {"softcap": 30.0, "causal": False}):
        lengths = [(2100, 2100), (700, 2500), (1, 1)]
        check(packed(device, lengths, (8, 2), head_dim, **options), None)
        check(paged(device, "16-bit", 16, lengths, (8, 2), head_dim, **options), None)


@needs_gpu
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_real_caches(kind, device):
    for page_size in (16, 128):
        check(paged(device, kind, page_size, [(500, 2500), (60, 60)], (8, 2), 128), None)
