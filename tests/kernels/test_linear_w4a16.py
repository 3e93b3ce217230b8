"""linear_w4a16 against its float64 reference, and the layouts against their definitions."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import TOLERANCE as KERNEL_TOLERANCE
from support.comparing import poisoned, relative_error
from support.packed_weights import random_weight

from llmopt_kernels.cpu_int4 import (
    cpu_int4_refusal,
    from_cpu_int4,
    matmul_dequantized,
    matmul_kernel,
    to_cpu_int4,
)
from llmopt_kernels.gpu_weight import to_gpu_weight
from llmopt_kernels.linear_w4a16 import (
    LinearConfig,
    candidate_configs,
    launch_linear_w4a16,
    linear_w4a16,
    linear_w4a16_reference,
    shipped_config,
)
from llmopt_kernels.linear_w4a16_on_cpu import cpu_choices
from llmopt_kernels.packed_weight import pack_codes, unpack_codes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 37), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_packing_is_exact_and_gapless(bits, out, inn, seed):
    codes, weight = random_weight(out, inn, 1, bits=bits, seed=seed)
    assert torch.equal(unpack_codes(weight.packed, bits, inn), codes)
    assert weight.packed.shape == (out, -(-inn // 8) * bits)
    word = sum(int(c) << (bits * i) for i, c in enumerate(codes[0]))
    assert bytes(weight.packed[0].tolist()) == word.to_bytes(weight.packed.shape[1], "little")


def test_packing_refuses_other_widths():
    with pytest.raises(ValueError, match="5 bits"):
        pack_codes(torch.zeros(1, 8, dtype=torch.uint8), 5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantize_is_its_formula(bits, indexed, asymmetric):
    codes, w = random_weight(5, 24, 3, bits=bits, asymmetric=asymmetric, indexed=indexed)
    dense = w.dequantize(torch.float64)
    for i in range(5):
        for j in range(24):
            group = int(w.group_index[j]) if indexed else j // 8
            zero = int(w.zero_points[i, group]) if asymmetric else 1 << (bits - 1)
            assert dense[i, j] == (int(codes[i, j]) - zero) * float(w.scales[i, group])
    assert torch.equal(w.dequantize(torch.float64, 2, 4), dense[2:4])


SHAPES = [(16, 32, 1), (48, 96, 3), (64, 256, 2), (80, 64, 2), (192, 320, 10), (208, 512, 1)]


@pytest.mark.parametrize(("out", "inn", "groups"), SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_kernels_layout_keeps_every_code(out, inn, groups, asymmetric):
    codes, weight = random_weight(out, inn, groups, asymmetric=asymmetric)
    for dtype in TOLERANCE:
        back = from_cpu_int4(to_cpu_int4(weight, dtype))
        assert torch.equal(unpack_codes(back.packed, 4, inn), codes)
        torch.testing.assert_close(
            back.dequantize(torch.float32), weight.dequantize(torch.float32), atol=0, rtol=1e-3
        )


@pytest.mark.parametrize(("out", "inn", "groups"), SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_products_of_the_kernels_layout(out, inn, groups, asymmetric, dtype):
    _, weight = random_weight(out, inn, groups, asymmetric=asymmetric)
    laid_out = to_cpu_int4(weight, dtype)
    for rows in (1, 5):
        x = torch.randn(rows, inn, generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected = linear_w4a16_reference(x, weight)
        assert relative_error(matmul_kernel(x, laid_out), expected) < TOLERANCE[dtype]
        for product_dtype in (dtype, torch.float32):
            found = matmul_dequantized(x, laid_out, product_dtype)
            assert relative_error(found, expected) < 2 * TOLERANCE[dtype]


def test_dequantizing_in_chunks_changes_nothing(monkeypatch):
    _, weight = random_weight(336, 128, 1, asymmetric=True)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    laid_out = to_cpu_int4(weight, torch.float32)
    whole = matmul_dequantized(x, laid_out, torch.float32), linear_w4a16(x, weight)
    monkeypatch.setattr(import_module("llmopt_kernels.cpu_int4"), "CHUNK_BYTES", 128 * 4 * 64)
    monkeypatch.setattr(
        import_module("llmopt_kernels.linear_w4a16_on_cpu"), "CHUNK_BYTES", 128 * 4 * 7
    )
    chunked = matmul_dequantized(x, laid_out, torch.float32), linear_w4a16(x, weight)
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("indexed", [False, True])
def test_any_width_through_the_launcher(bits, dtype, indexed):
    _, weight = random_weight(37, 72, 3, bits=bits, asymmetric=True, indexed=indexed)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 72, generator=generator).to(dtype)
    bias = torch.randn(37, generator=generator).to(dtype)
    found = linear_w4a16(x, weight, bias)
    assert found.shape == (2, 3, 37) and found.dtype == dtype
    assert relative_error(found, linear_w4a16_reference(x, weight, bias)) < TOLERANCE[dtype]


def test_the_launcher_follows_the_measured_choice(monkeypatch):
    _, weight = random_weight(32, 64, 1)
    laid_out = to_cpu_int4(weight, torch.bfloat16)
    taken = []
    for name in ("matmul_kernel", "matmul_dequantized"):
        monkeypatch.setattr(
            f"llmopt_kernels.linear_w4a16_on_cpu.{name}",
            lambda x, w, *_, name=name: taken.append(name) or x.new_zeros(x.shape[0], 32),
        )
    limit = cpu_choices()[torch.bfloat16].max_kernel_rows
    assert limit > 0
    linear_w4a16(torch.zeros(limit, 64, dtype=torch.bfloat16), laid_out)
    linear_w4a16(torch.zeros(limit + 1, 64, dtype=torch.bfloat16), laid_out)
    assert taken == ["matmul_kernel", "matmul_dequantized"]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (random_weight(16, 32, 1, bits=8)[1], "8 bits"),
        (random_weight(16, 64, 2, indexed=True)[1], "group index"),
        (random_weight(24, 32, 1)[1], "24 rows"),
        (random_weight(16, 48, 1)[1], "groups of 48"),
    ],
)
def test_what_the_kernel_cannot_hold_is_refused(weight, reason):
    assert reason in cpu_int4_refusal(weight)
    with pytest.raises(ValueError, match=reason):
        to_cpu_int4(weight, torch.float32)


def test_the_launcher_says_what_does_not_fit():
    _, weight = random_weight(16, 32, 1)
    with pytest.raises(ValueError, match="31 features, the weight 32"):
        linear_w4a16(torch.zeros(1, 31), weight)
    with pytest.raises(ValueError, match=r"float64"):
        linear_w4a16(torch.zeros(1, 32, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match="on meta"):
        linear_w4a16(torch.zeros(1, 32, device="meta"), weight)


def problem(batch, out, inn, dtype, device, seed=1):
    """Rows of ``x`` cut out of wider ones whose rest is NaN, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    wide = poisoned(batch, inn + 24, dtype=dtype, device=device)
    x = wide[:, 8 : 8 + inn]
    x.copy_(torch.randn(batch, inn, generator=generator))
    return x, torch.randn(out, generator=generator).to(device, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "out", "inn", "groups", "indexed"),
    [
        (1, 5, 32, 1, False),
        (3, 130, 96, 3, True),
        (16, 65, 384, 3, False),
        (17, 33, 576, 3, False),
        (1, 64, 640, 5, True),
        (65, 40, 160, 1, False),
        (3, 129, 512, 2, True),
    ],
)
def test_the_kernel_computes_the_reference(
    batch, out, inn, groups, indexed, dtype, asymmetric, bits, device
):
    _, weight = random_weight(
        out, inn, groups, bits=bits, asymmetric=asymmetric, indexed=indexed, device=device
    )
    x, bias = problem(batch, out, inn, dtype, device)
    expected = linear_w4a16_reference(x, weight, bias)
    found = launch_linear_w4a16(x, to_gpu_weight(weight), bias)
    assert found.dtype == dtype
    assert relative_error(found, expected) <= KERNEL_TOLERANCE[dtype]


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 256, 1280])
def test_every_group_size(group_size, device):
    _, weight = random_weight(20, 1280 // group_size * group_size, 1280 // group_size,
                              asymmetric=True, device=device)  # fmt: skip
    x, _ = problem(2, 20, weight.in_features, torch.float16, device)
    found = launch_linear_w4a16(x, to_gpu_weight(weight))
    expected = linear_w4a16_reference(x, weight)
    assert relative_error(found, expected) <= KERNEL_TOLERANCE[torch.float16]


@pytest.mark.parametrize("scales", [torch.float32, torch.float16])
def test_scales_of_any_type(scales, device):
    _, weight = random_weight(20, 128, 2, device=device)
    weight = replace(weight, scales=weight.scales.to(scales) * 1.001)
    x, _ = problem(2, 20, 128, torch.bfloat16, device)
    found = launch_linear_w4a16(x, to_gpu_weight(weight))
    expected = linear_w4a16_reference(x, weight)
    assert relative_error(found, expected) <= KERNEL_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_splits_of_the_columns_add_up(splits, with_bias, device):
    _, weight = random_weight(70, 5 * 256, 10, asymmetric=True, device=device)
    x, bias = problem(18, 70, 5 * 256, torch.float16, device)
    bias = bias if with_bias else None
    expected = linear_w4a16_reference(x, weight, bias)
    config = LinearConfig(16, 64, splits, 2, 3)
    found = launch_linear_w4a16(x, to_gpu_weight(weight), bias, config)
    assert relative_error(found, expected) <= KERNEL_TOLERANCE[torch.float16]


def test_the_shipped_configuration_fits_the_problem():
    for batch in (1, 16, 17, 64, 65, 4096):
        for out, chunks in ((64, 1), (4096, 16), (128256, 16), (4096, 56)):
            config = shipped_config(batch, out, chunks)
            assert config in candidate_configs(batch, out, chunks)
            assert 1 <= config.splits <= max(1, chunks // 2)
            assert config.block_batch >= min(batch, 64) and 128 % config.block_out == 0


def test_no_rows_and_no_launch(device):
    _, weight = random_weight(20, 64, 1, device=device)
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=device)
    assert launch_linear_w4a16(x, to_gpu_weight(weight)).shape == (0, 20)


def test_a_gpu_layout_goes_through_the_kernel_for_sixteen_bits(monkeypatch, device):
    _, weight = random_weight(20, 64, 1, device=device)
    laid_out = to_gpu_weight(weight)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(device)
    launched = []

    def launch(rows, *rest):
        launched.append(rows.dtype)
        return launch_linear_w4a16(rows, *rest)

    monkeypatch.setattr(import_module("llmopt_kernels.linear_w4a16"), "launch_linear_w4a16", launch)
    monkeypatch.setattr(
        import_module("llmopt_kernels.linear_w4a16"), "runs_kernel", lambda tensor: True
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = linear_w4a16(x.to(dtype), laid_out)
        assert found.shape == (2, 3, 20) and found.dtype == dtype
        expected = linear_w4a16_reference(x.to(dtype), weight)
        assert relative_error(found, expected) <= KERNEL_TOLERANCE[dtype]
    assert launched == [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_gpu_layout_on_a_cpu_takes_the_dequantized_product(dtype, monkeypatch):
    monkeypatch.setattr(
        import_module("llmopt_kernels.linear_w4a16_on_cpu"), "CHUNK_BYTES", 128 * 4 * 7
    )
    _, weight = random_weight(37, 128, 2, asymmetric=True, indexed=True)
    x, bias = problem(3, 37, 128, dtype, "cpu")
    found = linear_w4a16(x, to_gpu_weight(weight), bias)
    assert relative_error(found, linear_w4a16_reference(x, weight, bias)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 64)}, "x is float32; use bfloat16, float16"),
        ({"x": torch.zeros(64).half()}, r"x has shape \[64\]; expected \[\*, 64\]"),
        ({"x": torch.zeros(3, 32).half()}, r"x has shape \[3, 32\]; expected \[\*, 64\]"),
        ({"x": torch.zeros(64, 3).half().T}, "x has stride 3 in its last dimension"),
        ({"x": torch.zeros(3, 64, device="meta").half()}, "x on meta, packed on cpu"),
        ({"bias": torch.zeros(21)}, r"bias has shape \[21\]; expected \[20\]"),
        ({"bias": torch.zeros(20, dtype=torch.int64)}, "bias is int64; use"),
        ({"config": LinearConfig(16, 96, 1, 4, 2)}, "block_out is 96; use one of 64, 128"),
    ],
)
def test_what_does_not_fit_the_kernel_is_refused(changes, words):
    _, weight = random_weight(20, 64, 1)
    given = {"x": torch.zeros(3, 64).half(), "weight": to_gpu_weight(weight), **changes}
    with pytest.raises(ValueError, match=words):
        launch_linear_w4a16(**given)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "scales",
            lambda t: t.repeat(1, 2)[:, ::2],
            r"scales has strides .*; it must be contiguous",
        ),
        ("scales", lambda t: t[:, :64], r"scales has shape \[2, 64\]; expected \[\*, 128\]"),
        ("packed", lambda t: t.view(torch.float32), "packed is float32; use int32"),
        ("packed", lambda t: t[:, :64], "packed has 64 rows for 20 of the weight"),
        ("packed", lambda t: t.repeat(2, 1, 1), r"packed has shape \[2, 128, 32\]; expected \[1,"),
        (
            "zero_points",
            lambda t: t.repeat(2, 1),
            r"zero_points has shape \[2, 128\]; expected \[1,",
        ),
        ("scales", lambda t: t.int(), "scales is int32; use"),
        ("scales", lambda t: t[:1].repeat(8, 1), "scales has 8 groups for 128 columns"),
        ("scales", lambda t: t[:1].repeat(3, 1), "scales has 3 groups for 128 columns"),
        ("bits", lambda bits: 2, "bits is 2; use one of 4, 8"),
        (
            "column_order",
            lambda none: torch.arange(100),
            r"column_order has shape \[100\]; expected \[128\]",
        ),
        ("column_order", lambda none: torch.arange(128).int(), "column_order is int32; use int64"),
        ("zero_points", lambda t: t.view(torch.uint8), "zero_points is uint8; use int32"),
    ],
)
def test_a_damaged_layout_is_refused(part, change, words):
    laid_out = to_gpu_weight(random_weight(20, 128, 2, asymmetric=True)[1])
    damaged = replace(laid_out, **{part: change(getattr(laid_out, part))})
    with pytest.raises(ValueError, match=words):
        launch_linear_w4a16(torch.zeros(3, 128).half(), damaged)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("batch", [1, 16, 33, 500])
@pytest.mark.parametrize(("out", "inn", "groups"), [(4096, 4096, 32), (14336, 4096, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_real_shapes(batch, out, inn, groups, bits, device):
    _, weight = random_weight(out, inn, groups, bits=bits, asymmetric=True, device=device)
    x, bias = problem(batch, out, inn, torch.bfloat16, device)
    found = launch_linear_w4a16(x, to_gpu_weight(weight), bias)
    expected = linear_w4a16_reference(x, weight, bias)
    assert relative_error(found, expected) <= KERNEL_TOLERANCE[torch.bfloat16]
