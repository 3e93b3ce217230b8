"""kv_page_quantize against its float64 reference."""

import dataclasses

import pytest
import torch
from support.comparing import relative_error
from support.far_apart import far_apart

from llmopt_kernels.kv_page_quantize import (
    kv_page_quantize,
    kv_page_quantize_reference,
    launch_kv_page_quantize,
)
from llmopt_kernels.paged_kv import (
    PagedKV,
    dequantize_pages,
    from_interleaved,
    new_cache,
    unpack_nibbles,
)

SCALES = ("k_scale", "v_scale", "k_min", "v_min")


def problem(page_size, kv_heads, head_dim, dtype, device, seed=0):
    """A source of 4 pages in vLLM's layout, of which one is all NaN, and an int4 pool of 5."""
    g = torch.Generator().manual_seed(seed)
    pool = torch.randn(4, kv_heads, page_size, 2 * head_dim, generator=g)
    pool[0] = float("nan")
    pool[1:3] += torch.tensor([4.0, -4.0])[:, None, None, None]  # zero is out of their ranges
    source = from_interleaved(pool.to(dtype).to(device))
    cache = new_cache("int4", 5, page_size, kv_heads, head_dim, device=device)
    cache.k.fill_(171)
    cache.v.fill_(171)
    for name in SCALES:
        getattr(cache, name).fill_(7.0)
    source_pages = torch.tensor([3, 1, 2], dtype=torch.int32, device=device)
    pages = torch.tensor([0, 4, 2], dtype=torch.int32, device=device)
    return source, source_pages, cache, pages


def copied(cache):
    return PagedKV(**{n: None if t is None else t.clone() for n, t in cache.tensors().items()})


def assert_as_reference(cache, expected, source, source_pages, pages):
    for name in SCALES:
        wanted, found = getattr(expected, name), getattr(cache, name)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)
    k, v = dequantize_pages(source, source_pages, torch.float64)
    n = pages.long()
    parts = (
        ("k", k, expected.k_scale[n][:, None], expected.k_min[n][:, None]),
        ("v", v, expected.v_scale[n][..., None], expected.v_min[n][..., None]),
    )
    for name, x, scale, minimum in parts:
        scaled = ((x - minimum.double()) / scale.double()).nan_to_num(0.0)
        found, wanted = (unpack_nibbles(getattr(c, name)[n]).double() for c in (cache, expected))
        tie = (scaled - scaled.floor() - 0.5).abs() < 1e-3
        assert bool(((found - wanted).abs() <= tie.double()).all())
    others = [page for page in range(cache.num_pages) if page not in pages.tolist()]
    assert bool((cache.k[others] == 171).all()) and bool((cache.v[others] == 171).all())
    assert all(bool((getattr(cache, name)[others] == 7.0).all()) for name in SCALES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("page_size", "kv_heads", "head_dim"),
    [(16, 1, 64), (32, 3, 80), (16, 2, 96), (64, 1, 128), (16, 2, 192), (128, 1, 256)],
)
def test_it_packs_full_pages(page_size, kv_heads, head_dim, dtype, device):
    source, source_pages, cache, pages = problem(page_size, kv_heads, head_dim, dtype, device)
    expected = copied(cache)
    kv_page_quantize_reference(source, source_pages, expected, pages)
    launch_kv_page_quantize(source, source_pages, cache, pages)
    assert_as_reference(cache, expected, source, source_pages, pages)
    pairs = zip(
        dequantize_pages(cache, pages, torch.float64),
        dequantize_pages(source, source_pages, torch.float64),
        strict=True,
    )
    for found, given in pairs:
        assert relative_error(found, given) < 0.13  # a fifteenth of the range, uniform error


def test_half_a_scale_is_the_largest_error(device):
    source, source_pages, cache, pages = problem(16, 2, 64, torch.bfloat16, device)
    launch_kv_page_quantize(source, source_pages, cache, pages)
    k, v = dequantize_pages(source, source_pages, torch.float64)
    found_k, found_v = dequantize_pages(cache, pages, torch.float64)
    k_step, v_step = cache.k_scale[pages.long()][:, None], cache.v_scale[pages.long()][..., None]
    assert bool(((found_k - k).abs() <= 0.501 * k_step).all())
    assert bool(((found_v - v).abs() <= 0.501 * v_step).all())


def test_a_constant_comes_back_exactly(device):
    source, source_pages, cache, pages = problem(16, 2, 64, torch.bfloat16, device)
    source.k[3, :, 1, 5] = source.k[3, :, 1, 40] = -0.3
    source.v[3, 7, 0, :] = 1.7
    launch_kv_page_quantize(source, source_pages, cache, pages)
    k, v = dequantize_pages(cache, pages, torch.float64)
    assert torch.equal(k[0, :, 1, [5, 40]], source.k[3, :, 1, [5, 40]].double())
    assert torch.equal(v[0, 7, 0], source.v[3, 7, 0].double())
    assert float(cache.k_scale[0, 1, 5]) == 0.0 and float(cache.v_scale[0, 7, 0]) == 0.0


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_not_lost(strange, device):
    source, source_pages, cache, pages = problem(16, 2, 80, torch.bfloat16, device)
    source.k[3, 4, 1, 70] = strange
    source.v[3, 7, 0, 3] = strange
    launch_kv_page_quantize(source, source_pages, cache, pages)
    k, v = dequantize_pages(cache, pages, torch.float64)
    assert bool(k[0, :, 1, 70].isnan().all()) and bool(v[0, 7, 0].isnan().all())
    assert int(k.isnan().sum()) == 16 and int(v.isnan().sum()) == 80


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("part", ["source", "cache"])
@pytest.mark.parametrize("dim", [-4, -3, -2], ids=["pages", "tokens", "heads"])
def test_indices_beyond_32_bits(dim, part, device):
    source, source_pages, cache, pages = problem(16, 3, 64, torch.bfloat16, device)
    expected = copied(cache)
    kv_page_quantize_reference(source, source_pages, expected, pages)
    given = {"source": source, "cache": cache}
    k, v = far_apart([given[part].k, given[part].v], dim)
    given[part] = dataclasses.replace(given[part], k=k, v=v)
    launch_kv_page_quantize(**given, source_pages=source_pages, pages=pages)
    assert_as_reference(given["cache"], expected, source, source_pages, pages)


def test_negative_pages_are_skipped_and_nothing_is_a_problem_too(device):
    source, _, cache, _ = problem(16, 2, 64, torch.bfloat16, device)
    expected = copied(cache)
    source_pages = torch.tensor([2, -1, 1], device=device)
    pages = torch.tensor([-1, 3, 4], device=device)
    kv_page_quantize_reference(source, source_pages, expected, pages)
    launch_kv_page_quantize(source, source_pages, cache, pages)
    assert_as_reference(cache, expected, source, source_pages[2:], pages[2:])
    launch_kv_page_quantize(source, source_pages[:0], cache, pages[:0])


def test_the_operation_takes_the_reference_on_a_cpu():
    source, source_pages, cache, pages = problem(16, 2, 64, torch.bfloat16, "cpu")
    source.k[3, 4, 1, 40] = float("nan")
    expected = copied(cache)
    kv_page_quantize_reference(source, source_pages, expected, pages)
    kv_page_quantize(source, source_pages, cache, pages, check_values=True)
    source.k[3, 4, 1, 40] = 0.0
    assert_as_reference(cache, expected, source, source_pages, pages)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": new_cache("int8", 4, 16, 2, 64)}, "source is int8 and the cache int4"),
        ({"cache": new_cache("fp8", 4, 16, 2, 64)}, "source is 16-bit and the cache fp8"),
        ({"source": new_cache("16-bit", 4, 32, 2, 64)}, "page_size is 32 of the source and 16"),
        ({"source": new_cache("16-bit", 4, 16, 4, 64)}, "num_kv_heads is 4 of the source and 2"),
        ({"source": new_cache("16-bit", 4, 16, 2, 128)}, "head_dim is 128 of the source and 64"),
        ({"source_pages": torch.zeros(3)}, "source_pages is float32; use int32, int64"),
        ({"pages": torch.zeros(3, dtype=torch.int64)}, "pages is int64; use int32"),
        ({"pages": torch.zeros(2, dtype=torch.int32)}, r"pages has shape \[2\]; expected \[3\]"),
        ({"pages": torch.zeros(6, dtype=torch.int32)[::2]}, r"pages has strides \(2,\)"),
        ({"pages": torch.tensor([0, 5, 1]).int()}, r"pages\[1\] is 5; the pool has 5 pages"),
        ({"source_pages": torch.tensor([0, 1, 4]).int()}, r"source_pages\[2\] is 4; the pool has"),
        ({"pages": torch.tensor([2, 1, 2]).int()}, "a page is written twice"),
        ({"pages": torch.zeros(3, dtype=torch.int32, device="meta")}, "pages on meta"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    source, source_pages, cache, pages = problem(16, 2, 64, torch.bfloat16, "cpu")
    given = {"source": source, "source_pages": source_pages, "cache": cache, "pages": pages}
    values = "meta" not in words
    with pytest.raises(ValueError, match=words):
        launch_kv_page_quantize(**given | changes, check_values=values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("head_dim", [128, 256])
def test_real_shapes(head_dim, device):
    source, source_pages, cache, pages = problem(128, 32, head_dim, torch.bfloat16, device)
    expected = copied(cache)
    kv_page_quantize_reference(source, source_pages, expected, pages)
    launch_kv_page_quantize(source, source_pages, cache, pages)
    assert_as_reference(cache, expected, source, source_pages, pages)
