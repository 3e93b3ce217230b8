"""gptq_columns against the loop in float64, and the solver driven through the kernel."""

from importlib import import_module

import pytest
import torch
from support.comparing import poisoned

from llmopt.quantization.gptq import GPTQOptions, gptq
from llmopt.quantization.scheme import Scheme
from llmopt_kernels.gptq_columns import (
    ColumnsConfig,
    ColumnsProblem,
    candidate_configs,
    columns_per_call,
    gptq_columns,
    gptq_columns_reference,
    launch_gptq_columns,
)
from llmopt_kernels.launching import compiling

SMALL = ColumnsConfig(block_rows=16, columns_in_registers=4, num_warps=1)
NEAR = 1e-4


def problem(columns, rows, device, *, max_code=15, num_groups=3, symmetric=False, seed=0):
    """Arguments of an operation on a block cut out of larger buffers, as the solver's are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    weights = normal(columns, rows)
    scales = (0.5 + torch.rand(num_groups, rows, generator=generator)) * 4 / max_code
    middle = (max_code + 1) // 2
    zero_points = torch.randint(0, max_code + 1, (num_groups, rows), generator=generator)
    if symmetric:
        zero_points = torch.full((num_groups, rows), middle)
    feedback = torch.zeros(columns + 5, columns + 7)
    feedback[:columns, :columns] = (normal(columns, columns) * 0.2).tril(-1)
    groups = torch.randint(0, num_groups, (columns,), generator=generator)
    adjusted = weights + 0.3 * normal(columns, rows)
    arguments = {
        "adjusted": adjusted,
        "feedback": feedback,
        "scales": scales,
        "zero_points": zero_points.float(),
        "groups": groups,
        "errors": weights,
        "codes": torch.full((columns, rows), 255, dtype=torch.uint8),
    }
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    arguments["feedback"] = arguments["feedback"][:columns, :columns]
    return arguments


def reference(arguments, **options):
    """Errors, codes and how near each rounded value lay to the edge between two codes."""
    found = {
        name: tensor.double() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in arguments.items()
    }
    gptq_columns_reference(ColumnsProblem(**found, **options))
    steps = found["adjusted"] / found["scales"][found["groups"]]
    edge = (steps - steps.floor() - 0.5).abs()
    return found["errors"], found["codes"], edge


def check(arguments, expected, config=None, **options):
    """Run the kernel; rows without a value near an edge must agree in every code."""
    errors, codes, edge = expected
    launch_gptq_columns(ColumnsProblem(**arguments, **options), config)
    # A value near an edge may fall the other way, and what follows in its row with it.
    clear = (edge >= NEAR).all(dim=0)
    assert float(clear.float().mean()) >= 0.8
    assert torch.equal(arguments["codes"][:, clear], codes[:, clear])
    assert bool(torch.isfinite(arguments["errors"]).all())
    largest = float(errors.abs().max())
    # In float32 a sum of 128 products of either sign, then a difference.
    assert float((arguments["errors"] - errors)[:, clear].abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.parametrize(
    ("columns", "rows", "max_code"),
    [(1, 1, 15), (7, 33, 3), (16, 32, 255), (17, 5, 7), (33, 40, 15), (128, 31, 15)],
)
def test_it_is_the_loop(columns, rows, max_code, residuals, device):
    arguments = problem(columns, rows, device, max_code=max_code)
    options = {"max_code": max_code, "residuals": residuals}
    expected = reference(arguments, **options)
    if residuals:
        arguments["errors"] = poisoned(columns, rows, dtype=torch.float32, device=device)
    # What lies on the diagonal and above is not read.
    above = torch.ones(columns, columns, dtype=torch.bool, device=device).triu()
    arguments["feedback"].masked_fill_(above, float("nan"))
    check(arguments, expected, **options)


@pytest.mark.parametrize("config", [SMALL, *candidate_configs(40)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_configuration_gives_the_same(config, symmetric, device):
    arguments = problem(35, 40, device, symmetric=symmetric, seed=1)
    expected = reference(arguments, max_code=15)
    check(arguments, expected, config=config, max_code=15)


def test_nothing_beyond_the_block_is_touched(device):
    arguments = problem(18, 19, device, seed=2)
    expected = reference(arguments, max_code=15)
    outer = {
        "adjusted": poisoned(20, 24, dtype=torch.float32, device=device),
        "scales": poisoned(4, 24, dtype=torch.float32, device=device),
        "zero_points": poisoned(4, 24, dtype=torch.float32, device=device),
        "errors": poisoned(20, 24, dtype=torch.float32, device=device),
        "codes": torch.full((20, 24), 99, dtype=torch.uint8, device=device),
    }
    for name, tensor in outer.items():
        count, rows = arguments[name].shape
        tensor[:count, :rows] = arguments[name]
        arguments[name] = tensor[:count, :rows]
    check(arguments, expected, max_code=15)
    assert bool((outer["codes"][18:] == 99).all()) and bool((outer["codes"][:, 19:] == 99).all())
    assert bool(outer["errors"][18:].isnan().all()) and bool(outer["errors"][:, 19:].isnan().all())


def test_halves_go_to_even_and_what_is_far_is_clamped(device):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1e9, -1e9, 3e38, -3e38]
    expected = [8, 10, 10, 8, 6, 6, 15, 0, 15, 0]
    arguments = problem(1, len(values), device, num_groups=1, symmetric=True)
    arguments["adjusted"].copy_(torch.tensor([values]))
    arguments["scales"].fill_(1.0)
    launch_gptq_columns(ColumnsProblem(**arguments, max_code=15))
    assert arguments["codes"][0].tolist() == expected


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_do_is_done(shape, device):
    launch_gptq_columns(ColumnsProblem(**problem(*shape, device), max_code=15))


def test_the_operation_takes_the_loop_on_a_cpu():
    arguments = problem(9, 11, "cpu")
    errors, codes, _ = reference(arguments, max_code=15)
    gptq_columns(**arguments, max_code=15)
    assert torch.equal(arguments["codes"], codes)
    assert torch.allclose(arguments["errors"].double(), errors, atol=1e-5)
    assert columns_per_call(torch.empty(1)) == 32
    with compiling():
        assert columns_per_call(torch.empty(1, device="meta")) == 128


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("adjusted", torch.zeros(6, 8, dtype=torch.float64), "adjusted is float64; use float32"),
        ("adjusted", torch.zeros(8, 6).t(), "adjusted has stride 6 in its last dimension"),
        ("feedback", torch.zeros(6, 5), r"feedback has shape \[6, 5\]; expected \[6, 6\]"),
        ("feedback", torch.zeros(6, 6, dtype=torch.float16), "feedback is float16"),
        ("scales", torch.zeros(3, 7), r"scales has shape \[3, 7\]; expected \[\*, 8\]"),
        ("zero_points", torch.zeros(2, 8), r"zero_points has shape \[2, 8\]; expected \[3, 8\]"),
        ("zero_points", torch.zeros(3, 8, dtype=torch.uint8), "zero_points is uint8"),
        ("groups", torch.zeros(5, dtype=torch.int64), r"groups has shape \[5\]; expected \[6\]"),
        ("groups", torch.zeros(6, dtype=torch.int32), "groups is int32; use int64"),
        ("errors", torch.zeros(6, 9), r"errors has shape \[6, 9\]; expected \[6, 8\]"),
        ("codes", torch.zeros(6, 8), "codes is float32; use uint8"),
        ("codes", torch.zeros(6, 8, dtype=torch.uint8, device="meta"), "on several devices"),
    ],
)
def test_what_does_not_fit_is_refused(name, tensor, words):
    arguments = problem(6, 8, "cpu") | {name: tensor}
    with pytest.raises(ValueError, match=words):
        launch_gptq_columns(ColumnsProblem(**arguments, max_code=15))


def test_a_group_without_a_scale_is_refused_where_values_are_checked():
    arguments = problem(6, 8, "cpu") | {"groups": torch.full((6,), 3)}
    with pytest.raises(ValueError, match="groups go from 3 to 3; scales have rows 0 to 2"):
        gptq_columns(**arguments, max_code=15, check_values=True)


@pytest.mark.parametrize("max_code", [0, 256])
def test_a_code_that_no_byte_holds_is_refused(max_code):
    arguments = problem(6, 8, "cpu") | {"max_code": max_code}
    with pytest.raises(ValueError, match=f"max_code is {max_code}"):
        gptq_columns(**arguments)
    with pytest.raises(ValueError, match=f"max_code is {max_code}"):
        launch_gptq_columns(ColumnsProblem(**arguments))


def test_columns_too_far_apart_are_refused():
    arguments = {name: tensor.to("meta") for name, tensor in problem(2, 8, "cpu").items()}
    arguments["errors"] = torch.empty_strided((2, 8), (2**30, 1), device="meta")
    with pytest.raises(ValueError, match="2 columns 1073741824 elements apart"):
        launch_gptq_columns(ColumnsProblem(**arguments, max_code=15))


def layer(rows, columns):
    """A weight and the Hessian of correlated inputs of unequal energy."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    mix += 0.5 * torch.eye(columns)
    energy = torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix * energy
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize(
    ("order", "static", "group_size", "symmetric"),
    [
        ("none", True, 32, True),
        ("none", True, None, False),
        ("none", False, 80, True),
        ("none", False, 80, False),
        ("weight", True, 40, True),
        ("weight", True, 40, False),
        ("group", True, 40, False),
        ("group", False, 32, True),
    ],
)
def test_the_solver_finds_the_same_through_the_kernel(
    order, static, group_size, symmetric, device, monkeypatch
):
    weight, hessian = layer(31, 160)
    scheme = Scheme(4, group_size, symmetric, order)
    options = GPTQOptions(static_groups=static)
    # Scales in bfloat16 move the largest weight of a symmetric group off the edge of a code.
    expected = gptq(weight, hessian, scheme, options, torch.bfloat16)
    monkeypatch.setattr(import_module("llmopt_kernels.gptq_columns"), "runs_kernel", lambda _: True)
    found = gptq(weight.to(device), hessian.to(device), scheme, options, torch.bfloat16)
    assert torch.equal(found.tensor.codes.cpu(), expected.tensor.codes)
    assert torch.equal(found.tensor.scales.cpu(), expected.tensor.scales)
    assert found.error == pytest.approx(expected.error, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("order", ["none", "group"])
@pytest.mark.parametrize("static", [True, False])
def test_a_real_layer_loses_no_more_through_the_kernel(order, static):
    weight, hessian = layer(4096, 2048)
    scheme, options = Scheme(4, 128, False, order), GPTQOptions(static_groups=static)
    expected = gptq(weight, hessian, scheme, options, torch.bfloat16)
    found = gptq(weight.cuda(), hessian.cuda(), scheme, options, torch.bfloat16)
    differing = (found.tensor.codes.cpu() != expected.tensor.codes).any(dim=1)
    # A row has 2048 values that may lie near an edge.
    assert float(differing.float().mean()) <= 0.25
    assert found.error == pytest.approx(expected.error, rel=1e-3)
