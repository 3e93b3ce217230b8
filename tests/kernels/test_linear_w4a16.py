"""linear_w4a16 against its float64 reference, and the layouts against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_kernels.cpu_int4 import (
    cpu_int4_refusal,
    from_cpu_int4,
    matmul_dequantized,
    matmul_kernel,
    to_cpu_int4,
)
from llmopt_kernels.linear_w4a16 import cpu_choices, linear_w4a16, linear_w4a16_reference
from llmopt_kernels.packed_weight import PackedWeight, pack_codes, unpack_codes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def random_weight(out, inn, groups, *, bits=4, asymmetric=False, indexed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, inn), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, groups, generator=generator) * 0.02 + 0.005
    zeros = None
    if asymmetric:
        zeros = torch.randint(0, 1 << bits, (out, groups), generator=generator, dtype=torch.uint8)
    index = None
    if indexed:
        index = torch.randperm(inn, generator=generator).int() // (inn // groups)
    weight = PackedWeight(pack_codes(codes, bits), bits, inn, scales.bfloat16(), zeros, index)
    return codes, weight


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


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
    monkeypatch.setattr("llmopt_kernels.cpu_int4.CHUNK_BYTES", 128 * 4 * 64)
    monkeypatch.setattr("llmopt_kernels.linear_w4a16.CHUNK_BYTES", 128 * 4 * 7)
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
            f"llmopt_kernels.linear_w4a16.{name}",
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
