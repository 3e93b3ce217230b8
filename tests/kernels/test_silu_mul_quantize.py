"""silu_mul_quantize against its float64 reference."""

import pytest
import torch
from support.comparing import TOLERANCE, poisoned, relative_error
from support.rounded import assert_rounded_alike

from llmopt_kernels.silu_mul_quantize import (
    ACTIVATIONS,
    launch_silu_mul_quantize,
    silu_mul_quantize,
    silu_mul_quantize_reference,
)

# Of gates far from zero, on the way to 0 or 1: numpy warns of what is infinite in float32.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

HALF = [torch.bfloat16, torch.float16]
QUANTIZED = [torch.float8_e4m3fn, torch.int8]
SHAPES = [(1, 1), (17, 17), (3, 80), (2, 1025), (0, 64)]


def problem(tokens, n, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    # Rows are cut out of wider ones; what lies between them is poison.
    wide = poisoned(tokens, 2 * n + 3, dtype=dtype, device="cpu")
    wide[:, : 2 * n] = torch.randn(tokens, 2 * n, generator=g) * 3
    return wide.to(device)[:, : 2 * n]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_16_bit(shape, dtype, activation, device):
    gate_up = problem(*shape, dtype, device)
    expected, _ = silu_mul_quantize_reference(gate_up, activation=activation)
    found, scale = launch_silu_mul_quantize(gate_up, activation=activation)
    assert found.dtype == dtype and found.shape == shape and scale is None
    assert relative_error(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dynamic_scale_a_token(shape, out, activation, device):
    gate_up = problem(*shape, torch.bfloat16, device)
    expected = silu_mul_quantize_reference(gate_up, activation=activation, dtype=out)
    found = launch_silu_mul_quantize(gate_up, activation=activation, dtype=out)
    assert found[1].shape == (shape[0], 1)
    exact, _ = silu_mul_quantize_reference(gate_up, activation=activation)
    assert_rounded_alike(found, expected, exact)


@pytest.mark.parametrize("out", QUANTIZED)
@pytest.mark.parametrize("n", [8192, 8193, 17000, 65536])
def test_rows_that_are_read_twice(n, out, device):
    gate_up = problem(1, n, torch.bfloat16, device)
    # The largest magnitude is the last channel's, in a block that is not full.
    gate_up[:, [n - 1, 2 * n - 1]] = torch.tensor([20.0, -20.0]).to(gate_up)
    expected = silu_mul_quantize_reference(gate_up, dtype=out)
    found = launch_silu_mul_quantize(gate_up, dtype=out)
    assert_rounded_alike(found, expected, silu_mul_quantize_reference(gate_up)[0])


@pytest.mark.parametrize("factor", [0.1, 0.01])  # the second saturates
@pytest.mark.parametrize("n", [17, 1025])
def test_a_static_scale(n, factor, device):
    gate_up = problem(3, n, torch.bfloat16, device)
    scale = torch.full((1, 1), factor, device=device)
    options = {"dtype": torch.float8_e4m3fn, "scale": scale}
    expected = silu_mul_quantize_reference(gate_up, **options)
    found = launch_silu_mul_quantize(gate_up, **options)
    assert found[1] is scale
    assert_rounded_alike(found, expected, silu_mul_quantize_reference(gate_up)[0])


@pytest.mark.parametrize("out", QUANTIZED)
@pytest.mark.parametrize("n", [80, 8200])
def test_a_row_of_zeros_and_a_row_with_a_nan(n, out, device):
    gate_up = problem(3, n, torch.bfloat16, device)
    gate_up[0], gate_up[1, 7] = 0.0, float("nan")
    codes, scale = launch_silu_mul_quantize(gate_up, dtype=out)
    assert float(scale[0]) == 1.0 and float(codes[0].float().abs().max()) == 0.0
    assert bool(scale[1].isnan()) and not bool(scale[2].isnan())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero(activation, device):
    gate_up = torch.full((1, 10), 2.0, dtype=torch.bfloat16, device=device)
    gate_up[0, :5] = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30])
    found, _ = launch_silu_mul_quantize(gate_up, activation=activation)
    assert torch.equal(found, gate_up[:, :5].clamp(min=0.0) * 2)


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, *QUANTIZED])
def test_the_operation_takes_the_reference_on_a_cpu(out):
    gate_up = problem(3, 65, torch.bfloat16, "cpu")
    expected = silu_mul_quantize_reference(gate_up, dtype=out)
    found = silu_mul_quantize(gate_up, dtype=out)
    assert found[0].dtype == out
    assert_rounded_alike(found, expected, silu_mul_quantize_reference(gate_up)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate_up": torch.zeros(3, 64)}, "gate_up is float32; use bfloat16, float16"),
        ({"gate_up": torch.zeros(64).half()}, r"gate_up has shape \[64\]"),
        ({"gate_up": torch.zeros(64, 4).half().T}, "gate_up has stride 4 in its last"),
        ({"gate_up": torch.zeros(3, 65).half()}, "gate_up has 65 columns; two halves"),
        ({"gate_up": torch.zeros(3, 0).half()}, "gate_up has 0 columns"),
        ({"activation": "relu"}, "activation is 'relu'; use one of 'silu', 'gelu_tanh'"),
        ({"dtype": torch.float32}, "dtype is float32; use bfloat16, float16"),
        ({"dtype": torch.int8, "scale": torch.ones(1)}, "static scale was given for torch.int8"),
        ({"dtype": torch.float8_e4m3fn, "scale": torch.ones(2)}, r"scale has shape \[2\]"),
        (
            {"dtype": torch.float8_e4m3fn, "scale": torch.ones(1, device="meta")},
            "scale on meta",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    gate_up = problem(3, 64, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=words):
        launch_silu_mul_quantize(**{"gate_up": gate_up} | changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("out", [torch.bfloat16, *QUANTIZED])
@pytest.mark.parametrize("shape", [(4096, 14336), (64, 28672)])
def test_real_shapes(shape, out, device):
    gate_up = problem(*shape, torch.bfloat16, device)
    expected = silu_mul_quantize_reference(gate_up, dtype=out)
    found = launch_silu_mul_quantize(gate_up, dtype=out)
    assert_rounded_alike(found, expected, silu_mul_quantize_reference(gate_up)[0])
