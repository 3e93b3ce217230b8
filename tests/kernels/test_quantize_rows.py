"""quantize_rows against its reference: the same scales and, but on a tie, the same codes."""

import pytest
import torch
from support.comparing import poisoned

from llmopt_kernels.quantize_rows import (
    launch_quantize_by,
    launch_quantize_rows,
    launch_row_scales,
    quantize_rows,
    quantize_rows_reference,
)

FP8, INT8 = torch.float8_e4m3fn, torch.int8
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def activations(tokens, columns, dtype, device, seed=0):
    """Rows cut out of a wider tensor, whose rest is NaN."""
    generator = torch.Generator().manual_seed(seed)
    wide = poisoned(tokens, columns + 5, dtype=dtype, device=device)
    wide[:, :columns] = torch.randn(tokens, columns, generator=generator).to(dtype) * 3
    return wide[:, :columns]


def assert_same(found, expected):
    """Equal in the interpreter; a GPU's division may be off by its last bit, which tips a tie."""
    codes, scales = found
    expected_codes, expected_scales = expected
    assert codes.shape == expected_codes.shape and scales.shape == expected_scales.shape
    assert codes.dtype == expected_codes.dtype and scales.dtype == torch.float32
    torch.testing.assert_close(scales, expected_scales, rtol=5e-7, atol=0, equal_nan=True)
    different = codes.view(INT8) != expected_codes.view(INT8)
    if codes.device.type == "cpu":
        assert not bool(different.any())
    else:
        assert float(different.float().mean()) < 1e-3


@pytest.mark.parametrize("target", [FP8, INT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, 1), (3, 17), (2, 128), (2, 129), (5, 300), (2, 9001), (0, 64)]
)
def test_codes_and_scales_are_those_of_the_reference(tokens, columns, group, dtype, target, device):
    x = activations(tokens, columns, dtype, device)
    found = launch_quantize_rows(x, target, group)
    assert_same(found, quantize_rows_reference(x, target, group))
    assert found[0].is_contiguous()


@pytest.mark.parametrize("target", [FP8, INT8])
@pytest.mark.parametrize("group", [None, 128])
def test_codes_times_scales_are_the_values_but_for_half_a_step(target, group, device):
    x = activations(4, 300, torch.float32, device)
    codes, scales = launch_quantize_rows(x, target, group)
    spread = scales if group is None else scales.repeat_interleave(128, 1)[:, :300]
    values = x.double()
    error = (codes.double() * spread.double() - values).abs()
    # e4m3 has three bits after the point, and steps of 2**-9 below 2**-6.
    half = values.abs() / 16 + spread * 2**-10 if target == FP8 else spread * 0.5
    assert bool((error <= half * 1.000001).all())


@pytest.mark.parametrize("columns", [300, 9001])
def test_the_scales_alone_are_the_same(columns, device):
    x = activations(3, columns, torch.bfloat16, device)
    assert torch.equal(launch_row_scales(x, FP8), launch_quantize_rows(x, FP8)[1])


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (3, 3)])
def test_known_scales_are_used(shape, device):
    x = activations(3, 300, torch.bfloat16, device)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device) * 0.01 + 0.005
    codes = launch_quantize_by(x, scales, FP8)
    spread = scales.repeat_interleave(128, 1)[:, :300] if shape == (3, 3) else scales
    expected = (x.float() / spread).clamp(-448, 448).to(FP8)
    assert bool((expected.float().abs() == 448).any())  # some saturate
    assert_same((codes, scales), (expected, scales))


@pytest.mark.parametrize("target", [FP8, INT8])
@pytest.mark.parametrize("group", [None, 128])
def test_rows_that_are_not_ordinary(target, group, device):
    x = activations(6, 256, torch.float32, device).clone()
    x[0] = 0
    x[1, 3] = torch.finfo(torch.float32).max
    x[2] = x[2] * 1e-39  # its scale is subnormal
    x[3] = 0
    x[3, 7] = 1e-45  # nothing of it is left after the division by 448
    x[4, 200] = 1e30
    x[5] = -0.0
    codes, scales = launch_quantize_rows(x, target, group)
    assert not bool(codes.float().isnan().any()) and bool((scales > 0).all())
    assert float(scales[0, 0]) == 1 and not bool(codes[0].float().any())
    limit = 448 if target == FP8 else 127
    assert float(codes[1, 3].float()) == limit and float(codes[4, 200].float()) == limit
    if device == "cpu":
        assert_same((codes, scales), quantize_rows_reference(x, target, group))


@pytest.mark.parametrize("columns", [200, 9001])
def test_what_is_not_a_number_reaches_the_scale(columns, device):
    x = activations(3, columns, torch.bfloat16, device).clone()
    x[1, 150] = float("nan")
    codes, scales = launch_quantize_rows(x, FP8)
    assert scales.isnan().flatten().tolist() == [False, True, False]
    assert bool(codes[1].float().isnan().all())
    codes, scales = launch_quantize_rows(x[:, :200], FP8, 128)
    assert scales.isnan().tolist() == [[False, False], [False, True], [False, False]]


def test_the_operation_takes_the_reference_on_a_cpu():
    x = activations(3, 300, torch.bfloat16, "cpu")
    assert_same(quantize_rows(x, INT8, 128), quantize_rows_reference(x, INT8, 128))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3, 4, dtype=torch.float64), FP8), "x is float64; use bfloat16"),
        ((torch.zeros(3), FP8), r"x has shape \[3\]; expected \[\*, \*\]"),
        ((torch.zeros(3, 0), FP8), "x has no columns"),
        ((torch.zeros(3, 4).T, FP8), "stride 4 in its last dimension"),
        ((torch.zeros(3, 4), torch.uint8), "dtype is torch.uint8; use one of torch.float8_e4m3fn"),
        ((torch.zeros(3, 4), FP8, 64), "group is 64; use one of None, 128"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        quantize_rows(*arguments)
    with pytest.raises(ValueError, match=words):
        launch_quantize_rows(*arguments)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (torch.ones(2, 1), r"scales has shape \[2, 1\]; expected \[3, 1\]"),
        (torch.ones(3, 2), r"scales has shape \[3, 2\]; expected \[3, 3\]"),
        (torch.ones(1, dtype=torch.bfloat16), "scales is bfloat16; use float32"),
    ],
)
def test_known_scales_that_do_not_fit_are_refused(scales, words):
    with pytest.raises(ValueError, match=words):
        launch_quantize_by(torch.zeros(3, 300), scales, FP8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("group", [None, 128])
def test_real_shapes(group):
    x = activations(4096, 14336, torch.bfloat16, "cuda")
    assert_same(launch_quantize_rows(x, FP8, group), quantize_rows_reference(x, FP8, group))
