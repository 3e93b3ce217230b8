"""kv_cache_write against its float64 reference, cache kind by cache kind."""

import dataclasses

import pytest
import torch
from support.comparing import TOLERANCE, relative_error
from support.far_apart import far_apart

from llmopt_kernels.kv_cache_write import (
    WriteProblem,
    kv_cache_write,
    kv_cache_write_reference,
    launch_kv_cache_write,
)
from llmopt_kernels.paged_kv import PagedKV, dequantize_pages, from_interleaved, new_cache
from llmopt_kernels.rope import rope_reference

KINDS = ["16-bit", "fp8", "int8"]
NUM_PAGES = 3


def filled(kind, page_size, kv_heads, head_dim, dtype, device):
    """A pool whose every byte is a known pattern, so that a stray write shows."""
    cache = new_cache(kind, NUM_PAGES, page_size, kv_heads, head_dim, dtype=dtype, device=device)
    for part in (cache.k, cache.v):
        part.fill_(3)
    if kind == "fp8":
        cache.k_scale.copy_(torch.linspace(0.003, 0.02, kv_heads))
        cache.v_scale.copy_(torch.linspace(0.02, 0.003, kv_heads))
    if kind == "int8":
        cache.k_scale.fill_(7.0)
        cache.v_scale.fill_(7.0)
    return cache


def copied(cache):
    return PagedKV(**{n: None if t is None else t.clone() for n, t in cache.tensors().items()})


def problem(tokens, heads, kv_heads, head_dim, rotary_dim, dtype, device, page_size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    # One fused row a token, poisoned around what the operation may read.
    wide = torch.full((tokens, heads + 2 * kv_heads + 2, head_dim), float("nan"))
    wide[:, 1:-1] = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=g)
    wide = wide.to(dtype).to(device)
    q, k, v = wide[:, 1:-1].split([heads, kv_heads, kv_heads], 1)
    slots = torch.randperm(NUM_PAGES * page_size, generator=g)[:tokens]
    given = {"k": k, "v": v, "slots": slots.to(device)}
    if rotary_dim:
        angles = torch.rand(50, rotary_dim // 2, generator=g) * 6
        positions = torch.randint(0, 50, (tokens,), generator=g, dtype=torch.int32)
        given |= {"q": q, "positions": positions.to(device)}
        given |= {"cos": angles.cos().to(device), "sin": angles.sin().to(device)}
    return wide, given


def assert_codes_equal(found, expected, before_rounding):
    """Equal codes; off by one where the value to be rounded is within 1e-3 of a half."""
    difference = (found.double() - expected.double()).abs()
    tie = (before_rounding - before_rounding.floor() - 0.5).abs() < 1e-3
    assert bool((difference <= tie.double()).all()), f"{int((difference > tie).sum())} codes differ"


def assert_as_reference(cache, expected, given, dtype):
    every_page = torch.arange(NUM_PAGES, device=cache.k.device)
    pairs = zip(
        dequantize_pages(cache, every_page, torch.float64),
        dequantize_pages(expected, every_page, torch.float64),
        strict=True,
    )
    for found, wanted in pairs:
        assert relative_error(found, wanted) <= TOLERANCE[dtype]
    written = given["slots"] >= 0
    slots = given["slots"][written]
    k = given["k"].double()
    if "cos" in given:
        k = rope_reference(k, given["positions"], given["cos"], given["sin"])
    for name, x in (("k", k), ("v", given["v"].double())):
        found, wanted = (getattr(c, name).flatten(0, 1) for c in (cache, expected))
        if cache.kind == "int8":
            scales = [getattr(c, f"{name}_scale").flatten(0, 1) for c in (cache, expected)]
            torch.testing.assert_close(*scales, rtol=1e-6, atol=0)
            scaled = x[written] / scales[1][slots].double()[..., None]
            assert_codes_equal(found[slots], wanted[slots], scaled)
        others = torch.ones(len(found), dtype=torch.bool, device=found.device)
        others[slots] = False
        assert torch.equal(found[others].float(), torch.full_like(found[others].float(), 3.0))
        if cache.kind == "int8":
            assert bool((scales[0][others] == 7.0).all())


SHAPES = [  # tokens, heads, kv heads, head dimension, rotated channels, page size
    (1, 1, 1, 64, 64, 16),
    (17, 3, 3, 80, 80, 32),
    (5, 18, 9, 96, 32, 16),
    (3, 16, 2, 128, 128, 128),
    (3, 2, 1, 192, 64, 16),
    (2, 8, 2, 256, 256, 64),
    (5, 1, 5, 80, 0, 16),
    (0, 4, 4, 64, 64, 16),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_rotates_encodes_and_scatters(shape, kind, dtype, device):
    *sizes, page_size = shape
    wide, given = problem(*sizes, dtype, device, page_size)
    given["slots"][1::4] = -1
    before = wide.clone()
    cache = filled(kind, page_size, sizes[2], sizes[3], dtype, device)
    expected = copied(cache)
    expected_q = given["q"].clone() if "q" in given else None
    kv_cache_write_reference(WriteProblem(**given | {"q": expected_q}, cache=expected))
    launch_kv_cache_write(WriteProblem(**given, cache=cache))
    assert_as_reference(cache, expected, given, dtype)
    first_kept = 1
    if "q" in given:
        assert relative_error(given["q"], expected_q) <= TOLERANCE[dtype]
        first_kept += sizes[1]
        rest = given["q"][..., sizes[4] :]
        assert torch.equal(rest, before[:, 1:first_kept, sizes[4] :])
    assert torch.equal(wide[:, first_kept:].nan_to_num(), before[:, first_kept:].nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
def test_int32_slots_and_a_key_alone(kind, device):
    _, given = problem(7, 2, 2, 64, 64, torch.bfloat16, device)
    given["slots"] = given["slots"].int()
    given["positions"] = given["positions"].long()
    del given["q"]
    cache = filled(kind, 16, 2, 64, torch.bfloat16, device)
    expected = copied(cache)
    kv_cache_write_reference(WriteProblem(**given, cache=expected))
    launch_kv_cache_write(WriteProblem(**given, cache=cache))
    assert_as_reference(cache, expected, given | {"slots": given["slots"].long()}, torch.bfloat16)


def test_keys_and_values_interleaved_in_the_last_dimension(device):
    _, given = problem(9, 4, 2, 128, 128, torch.bfloat16, device)
    pool = torch.full((NUM_PAGES, 2, 16, 256), 3.0, dtype=torch.bfloat16, device=device)
    cache = from_interleaved(pool)
    expected = copied(cache)
    kv_cache_write_reference(WriteProblem(**given | {"q": None}, cache=expected))
    launch_kv_cache_write(WriteProblem(**given, cache=cache))
    assert_as_reference(cache, expected, given, torch.bfloat16)


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("dim", [-4, -3, -2], ids=["pages", "tokens", "heads"])
def test_indices_beyond_32_bits(dim, device):
    _, given = problem(16, 3, 3, 64, 64, torch.bfloat16, device)
    given["slots"] = given["slots"].int()
    cache = filled("16-bit", 16, 3, 64, torch.bfloat16, device)
    expected = copied(cache)
    kv_cache_write_reference(WriteProblem(**given | {"q": None}, cache=expected))
    q = rope_reference(given["q"], given["positions"], given["cos"], given["sin"])
    parts = ["q", "k", "v"] if dim != -4 else []  # they have no pages
    near = [given[name] for name in parts] + [cache.k, cache.v]
    *far, cache_k, cache_v = far_apart(near, dim)
    given |= dict(zip(parts, far, strict=True))
    launch_kv_cache_write(WriteProblem(**given, cache=PagedKV(cache_k, cache_v)))
    near_cache = PagedKV(cache_k.contiguous(), cache_v.contiguous())
    given["slots"] = given["slots"].long()
    assert_as_reference(near_cache, expected, given, torch.bfloat16)
    assert relative_error(given["q"], q) <= TOLERANCE[torch.bfloat16]


def test_fp8_saturates(device):
    _, given = problem(2, 1, 1, 64, 0, torch.bfloat16, device)
    cache = filled("fp8", 16, 1, 64, torch.bfloat16, device)
    cache.k_scale.fill_(1e-4)
    launch_kv_cache_write(WriteProblem(**given, cache=cache))
    codes = cache.k.flatten(0, 1)[given["slots"]].float()
    assert float(codes.abs().max()) == 448.0 and not bool(codes.isnan().any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_one(kind, device):
    _, given = problem(2, 1, 1, 64, 64, torch.bfloat16, device)
    given["k"][0, 0, 5] = given["v"][0, 0, 5] = float("nan")
    cache = filled(kind, 16, 1, 64, torch.bfloat16, device)
    launch_kv_cache_write(WriteProblem(**given, cache=cache))
    every_page = torch.arange(NUM_PAGES, device=device)
    for x in dequantize_pages(cache, every_page, torch.float64):
        rows = x.flatten(0, 1)[given["slots"]]
        assert bool(rows[0, 0, 5].isnan()) and not bool(rows[1].isnan().any())


def test_a_row_of_zeros_has_a_scale_of_one(device):
    _, given = problem(1, 1, 1, 64, 64, torch.bfloat16, device)
    given["k"].zero_()
    cache = filled("int8", 16, 1, 64, torch.bfloat16, device)
    launch_kv_cache_write(WriteProblem(**given, cache=cache))
    slot = given["slots"]
    assert float(cache.k_scale.flatten(0, 1)[slot]) == 1.0
    assert int(cache.k.flatten(0, 1)[slot].abs().max()) == 0


def test_the_operation_takes_the_reference_on_a_cpu():
    _, given = problem(3, 2, 2, 64, 64, torch.bfloat16, "cpu")
    cache = filled("int8", 16, 2, 64, torch.bfloat16, "cpu")
    expected, q = copied(cache), given["q"].clone()
    kv_cache_write_reference(WriteProblem(**given | {"q": q}, cache=expected))
    kv_cache_write(**given, cache=cache, check_values=True)
    assert_as_reference(cache, expected, given, torch.bfloat16)
    assert relative_error(given["q"], q) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": torch.zeros(3, 2, 64)}, "k is float32; use bfloat16, float16"),
        ({"k": torch.zeros(3, 2, 64).half()}, "k is float16; use bfloat16"),
        ({"k": torch.zeros(3, 4, 64)}, r"k has shape \[3, 4, 64\]; expected \[\*, 2, 64\]"),
        ({"k": torch.zeros(3, 2, 128)}, r"expected \[\*, 2, 64\]"),
        ({"v": torch.zeros(2, 2, 64)}, r"v has shape \[2, 2, 64\]; expected \[3, 2, 64\]"),
        ({"v": torch.zeros(3, 2, 64)}, "v is float32; use bfloat16"),
        (
            {"v": torch.zeros(3, 64, 2, dtype=torch.bfloat16).transpose(1, 2)},
            "v has stride 2 in its last dimension",
        ),
        ({"q": torch.zeros(3, 2, 32)}, r"q has shape \[3, 2, 32\]"),
        (
            {"q": torch.zeros(1, 2, 64).bfloat16().expand(3, 2, 64)},
            r"q has strides \(0, 64, 1\)",
        ),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, r"slots has shape \[4\]"),
        ({"slots": torch.zeros(3)}, "slots is float32; use int64, int32"),
        ({"slots": torch.zeros(6, dtype=torch.int64)[::2]}, r"slots has strides \(2,\)"),
        ({"cos": None}, "q, positions, sin given without cos"),
        (
            {"cos": None, "sin": None, "positions": None},
            "q given without positions, cos, sin",
        ),
        ({"sin": torch.zeros(50, 16)}, r"sin has shape \[50, 16\]; expected \[50, 32\]"),
        (
            {"cos": torch.zeros(50, 40), "sin": torch.zeros(50, 40)},
            "tables rotate 80 channels, k has 64",
        ),
        ({"cache": new_cache("int4", 3, 16, 2, 64)}, "int4.*kv_page_quantize"),
        (
            {"cache": dataclasses.replace(new_cache("int8", 3, 16, 2, 64), k_scale=None)},
            "int8 lacks k_scale",
        ),
        ({"slots": torch.tensor([4, -1, 48])}, r"slots\[2\] is 48; the pool has 48 slots"),
        ({"slots": torch.tensor([4, -1, 4])}, "two tokens share a slot"),
        ({"positions": torch.tensor([0, 50, 1])}, r"positions\[1\] is 50; the tables have 50"),
        ({"positions": torch.tensor([0, -2, 1])}, r"positions\[1\] is -2; the tables"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    _, given = problem(3, 2, 2, 64, 64, torch.bfloat16, "cpu")
    cache = new_cache("16-bit", NUM_PAGES, 16, 2, 64)
    with pytest.raises(ValueError, match=words):
        kv_cache_write(**{"cache": cache, **given, **changes}, check_values=True)


def test_several_devices_are_refused():
    _, given = problem(3, 2, 2, 64, 64, torch.bfloat16, "cpu")
    cache = new_cache("16-bit", NUM_PAGES, 16, 2, 64, device="meta")
    with pytest.raises(ValueError, match=r"k on cpu, .* cache.k on meta"):
        launch_kv_cache_write(WriteProblem(**given, cache=cache))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_real_shapes(kind, device):
    _, given = problem(48, 32, 8, 128, 128, torch.bfloat16, device)
    cache = filled(kind, 16, 8, 128, torch.bfloat16, device)
    expected = copied(cache)
    kv_cache_write_reference(WriteProblem(**given | {"q": given["q"].clone()}, cache=expected))
    launch_kv_cache_write(WriteProblem(**given, cache=cache))
    assert_as_reference(cache, expected, given, torch.bfloat16)
