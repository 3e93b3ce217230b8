"""norm_quantize against its float64 reference."""

import pytest
import torch
from support.comparing import TOLERANCE, poisoned, relative_error
from support.rounded import assert_rounded_alike

from llmopt_kernels.norm_quantize import (
    launch_norm_quantize,
    norm_quantize,
    norm_quantize_reference,
)

HALF = [torch.bfloat16, torch.float16]
QUANTIZED = [torch.float8_e4m3fn, torch.int8]
SHAPES = [(1, 1), (17, 1), (5, 17), (9, 128), (3, 257), (2, 2880), (0, 64)]


def problem(tokens, hidden, dtype, device, seed=0, weight_dtype=None):
    g = torch.Generator().manual_seed(seed)
    # Rows are cut out of wider ones; what lies between them is poison.
    wide = poisoned(tokens, hidden + 3, dtype=dtype, device="cpu")
    wide[:, :hidden] = torch.randn(tokens, hidden, generator=g) * 3
    residual = torch.randn(tokens, hidden, generator=g).to(dtype)
    weight = (torch.rand(hidden, generator=g) + 0.5).to(weight_dtype or dtype)
    return wide.to(device)[:, :hidden], weight.to(device), residual.to(device)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_16_bit(shape, dtype, device):
    x, weight, _ = problem(*shape, dtype, device)
    before = x.clone()
    expected, _ = norm_quantize_reference(x, weight)
    found, scale = launch_norm_quantize(x, weight)
    assert found.dtype == dtype and found.shape == x.shape and scale is None
    assert relative_error(found, expected) <= TOLERANCE[dtype]
    assert torch.equal(x, before)


@pytest.mark.parametrize("out", [torch.bfloat16, *QUANTIZED])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_is_added_and_updated(shape, out, device):
    x, weight, residual = problem(*shape, torch.bfloat16, device, weight_dtype=torch.float32)
    expected_residual = residual.clone()
    options = {"weight_offset": 1.0, "eps": 1e-5, "dtype": out}
    expected = norm_quantize_reference(x, weight, **options, residual=expected_residual)
    found = launch_norm_quantize(x, weight, **options, residual=residual)
    assert torch.equal(residual, expected_residual)
    exact, _ = norm_quantize_reference(residual, weight, **options | {"dtype": torch.bfloat16})
    assert_rounded_alike(found, expected, exact)


@pytest.mark.parametrize("out", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dynamic_scale_a_token(shape, out, device):
    x, weight, _ = problem(*shape, torch.float16, device)
    expected = norm_quantize_reference(x, weight, dtype=out)
    found = launch_norm_quantize(x, weight, dtype=out)
    assert found[1].shape == (shape[0], 1)
    assert_rounded_alike(found, expected, norm_quantize_reference(x, weight)[0])


@pytest.mark.parametrize("factor", [0.01, 0.002])  # the second saturates
def test_a_static_scale(factor, device):
    x, weight, _ = problem(3, 257, torch.bfloat16, device)
    scale = torch.tensor(factor, device=device)
    options = {"dtype": torch.float8_e4m3fn, "scale": scale}
    expected = norm_quantize_reference(x, weight, **options)
    found = launch_norm_quantize(x, weight, **options)
    assert found[1] is scale
    assert_rounded_alike(found, expected, norm_quantize_reference(x, weight)[0])


def test_the_widest_row(device):
    x, weight, residual = problem(1, 16384, torch.bfloat16, device)
    expected_residual = residual.clone()
    expected = norm_quantize_reference(x, weight, residual=expected_residual, dtype=torch.int8)
    found = launch_norm_quantize(x, weight, residual=residual, dtype=torch.int8)
    exact, _ = norm_quantize_reference(expected_residual, weight)
    assert_rounded_alike(found, expected, exact)


@pytest.mark.parametrize("out", QUANTIZED)
def test_a_row_of_zeros_and_a_row_with_a_nan(out, device):
    x, weight, _ = problem(3, 80, torch.bfloat16, device)
    x[0], x[1, 7] = 0.0, float("nan")
    codes, scale = launch_norm_quantize(x, weight, dtype=out)
    assert float(scale[0]) == 1.0 and float(codes[0].float().abs().max()) == 0.0
    assert bool(scale[1].isnan()) and not bool(scale[2].isnan())


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, *QUANTIZED])
def test_the_operation_takes_the_reference_on_a_cpu(out):
    x, weight, residual = problem(3, 65, torch.bfloat16, "cpu")
    expected_residual = residual.clone()
    expected = norm_quantize_reference(x, weight, residual=expected_residual, dtype=out)
    found = norm_quantize(x, weight, residual=residual, dtype=out)
    assert found[0].dtype == out and torch.equal(residual, expected_residual)
    assert_rounded_alike(found, expected, norm_quantize_reference(residual, weight)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 64)}, "x is float32; use bfloat16, float16"),
        ({"x": torch.zeros(64).half()}, r"x has shape \[64\]; expected \[\*, \*\]"),
        ({"x": torch.zeros(64, 3).half().T}, "x has stride 3 in its last dimension"),
        ({"x": torch.zeros(1, 16385).half()}, "x has 16385 channels; 1 to 16384 fit"),
        ({"x": torch.zeros(1, 0).half()}, "x has 0 channels"),
        ({"weight": torch.zeros(65)}, r"weight has shape \[65\]; expected \[64\]"),
        ({"weight": torch.zeros(64).double()}, "weight is float64"),
        ({"weight": torch.zeros(128)[::2]}, "weight has stride 2"),
        ({"weight": torch.zeros(64, device="meta")}, "weight on meta"),
        ({"residual": torch.zeros(3, 64).half()}, "residual is float16; use bfloat16"),
        ({"residual": torch.zeros(2, 64).bfloat16()}, r"residual has shape \[2, 64\]"),
        (
            {"residual": torch.zeros(1, 64).bfloat16().expand(3, 64)},
            r"residual has strides \(0, 1\)",
        ),
        ({"eps": 0.0}, "eps is 0.0; it must be positive"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"dtype": torch.float8_e5m2}, "dtype is float8_e5m2; use bfloat16, float16"),
        ({"dtype": torch.int8, "scale": torch.ones(1)}, "static scale was given for torch.int8"),
        ({"scale": torch.ones(1)}, "static scale was given for torch.bfloat16"),
        ({"dtype": torch.float8_e4m3fn, "scale": torch.ones(3, 1)}, r"scale has shape \[3, 1\]"),
        ({"dtype": torch.float8_e4m3fn, "scale": torch.ones(1).half()}, "scale is float16"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    x, weight, residual = problem(3, 64, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=words):
        launch_norm_quantize(**{"x": x, "weight": weight, "residual": residual} | changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("out", [torch.bfloat16, *QUANTIZED])
@pytest.mark.parametrize("shape", [(4096, 4096), (64, 8192), (8192 * 32, 128)])
def test_real_shapes(shape, out, device):
    x, weight, residual = problem(*shape, torch.bfloat16, device)
    expected_residual = residual.clone()
    expected = norm_quantize_reference(x, weight, residual=expected_residual, dtype=out)
    found = launch_norm_quantize(x, weight, residual=residual, dtype=out)
    assert_rounded_alike(found, expected, norm_quantize_reference(residual, weight)[0])
