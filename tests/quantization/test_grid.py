import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.grid import SCALE_DTYPES, Grid, encode, group_moments, make_grid
from llmopt.quantization.scheme import INT_BITS, Scheme

schemes = st.builds(
    Scheme,
    bits=st.sampled_from(INT_BITS),
    group_size=st.none(),
    symmetric=st.booleans(),
)
scale_dtypes = st.sampled_from(SCALE_DTYPES)
values = st.lists(
    st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=40
).map(lambda row: torch.tensor([row]))


def decoded(codes: torch.Tensor, grid: Grid, scheme: Scheme) -> torch.Tensor:
    zero = scheme.midpoint if grid.zero_points is None else grid.zero_points.double().unsqueeze(-1)
    return (codes.double() - zero) * grid.scales.double().unsqueeze(-1)


@given(
    values=values, scheme=schemes, scale_dtype=scale_dtypes, clip=st.sampled_from(["none", "mse"])
)
@settings(max_examples=100, deadline=None)
def test_values_within_range_are_at_most_half_a_step_away(values, scheme, scale_dtype, clip):
    grid = make_grid(values, scheme, scale_dtype, clip)
    codes = encode(values, grid, scheme)
    scale = grid.scales.double().unsqueeze(-1)
    zero = scheme.midpoint if grid.zero_points is None else grid.zero_points.double().unsqueeze(-1)
    low, high = -zero * scale, (scheme.max_code - zero) * scale
    inside = (values >= low) & (values <= high)
    distance = (decoded(codes, grid, scheme) - values).abs()
    assert bool((distance[inside] <= (scale * 0.500001).expand_as(values)[inside]).all())
    # Outside of it, the nearest code is the last one.
    assert bool((codes[values > high] == scheme.max_code).all())
    assert bool((codes[values < low] == 0).all())


@given(values=values, scheme=schemes, scale_dtype=scale_dtypes)
@settings(max_examples=60, deadline=None)
def test_the_whole_range_is_covered_without_clipping(values, scheme, scale_dtype):
    grid = make_grid(values, scheme, scale_dtype, "none")
    error = (decoded(encode(values, grid, scheme), grid, scheme) - values).abs()
    # Half a step, and what rounding the scale and the zero point may cost at the ends.
    slack = torch.finfo(scale_dtype).eps * (scheme.max_code + 1)
    step = 0.5 if scheme.symmetric else 1.0
    smallest = 2.0**-20 if scale_dtype is torch.float16 else 0.0
    bound = grid.scales.double().clamp(min=smallest) * (step + slack)
    assert bool((error <= bound.unsqueeze(-1)).all())


@given(values=values, scheme=schemes, scale_dtype=scale_dtypes)
@settings(max_examples=60, deadline=None)
def test_searched_clipping_is_never_worse(values, scheme, scale_dtype):
    errors = []
    for clip in ("none", "mse"):
        grid = make_grid(values, scheme, scale_dtype, clip)
        errors.append(
            float((decoded(encode(values, grid, scheme), grid, scheme) - values).square().sum())
        )
    assert errors[1] <= errors[0] * (1 + 1e-5) + 1e-30


def test_searched_clipping_helps_where_an_outlier_stretches_the_range():
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    values[:, 5] = 8.0
    for bits in (2, 3, 4):
        for symmetric in (True, False):
            scheme = Scheme(bits, None, symmetric)
            errors = [
                float((decoded(encode(values, grid, scheme), grid, scheme) - values).square().sum())
                for grid in (make_grid(values, scheme, torch.bfloat16, c) for c in ("none", "mse"))
            ]
            assert errors[1] < 0.99 * errors[0], (scheme, errors)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_a_group_of_zeros_is_exact_and_its_scale_is_not_zero(scale_dtype, symmetric, clip):
    scheme = Scheme(4, None, symmetric)
    grid = make_grid(torch.zeros(3, 7), scheme, scale_dtype, clip)
    assert bool((grid.scales > 0).all())
    assert bool((decoded(encode(torch.zeros(3, 7), grid, scheme), grid, scheme) == 0).all())


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_denormal_groups_get_a_positive_scale_and_finite_codes(scale_dtype, clip):
    values = torch.tensor([[1e-44, -1e-40, 0.0], [1e-39, 2e-39, -1e-45]])
    scheme = Scheme(4, None)
    grid = make_grid(values, scheme, scale_dtype, clip)
    assert bool((grid.scales > 0).all())
    assert float((decoded(encode(values, grid, scheme), grid, scheme) - values).abs().max()) < 1e-5


def test_an_exact_grid_is_recovered_exactly():
    steps = torch.arange(-7, 8).float().repeat(2, 1) * torch.tensor([[0.25], [2.0]])
    steps[:, 0] = -7.5 * torch.tensor([0.25, 2.0])  # makes max / 7.5 the step itself
    grid = make_grid(steps, Scheme(4, None), torch.bfloat16, "none")
    assert grid.scales.tolist() == [0.25, 2.0]
    codes = encode(steps[:, 1:], grid, Scheme(4, None))
    assert torch.equal(decoded(codes, grid, Scheme(4, None)).float(), steps[:, 1:])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_asymmetric_range_includes_zero(sign):
    values = sign * torch.tensor([[5.0, 6.0, 7.0]])
    grid = make_grid(values, Scheme(4, None, False), torch.float32, "none")
    assert grid.zero_points is not None
    assert grid.zero_points.tolist() == [1 if sign > 0 else 15]


@given(
    values=values,
    bits=st.sampled_from(INT_BITS),
    scale_dtype=scale_dtypes,
    clip=st.sampled_from(["none", "mse"]),
)
@settings(max_examples=60, deadline=None)
def test_zero_points_are_at_least_one_and_the_largest_value_is_kept(
    values, bits, scale_dtype, clip
):
    scheme = Scheme(bits, None, False)
    grid = make_grid(values.abs(), scheme, scale_dtype, clip)
    assert grid.zero_points is not None and bool((grid.zero_points >= 1).all())
    if clip == "none":
        reach = (scheme.max_code - grid.zero_points.double()) * grid.scales.double()
        assert bool((reach >= values.abs().max() * (1 - torch.finfo(scale_dtype).eps)).all())


def test_codes_are_chosen_for_the_stored_scale():
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    scheme = Scheme(8, None)
    grid = make_grid(values, scheme, torch.bfloat16, "none")
    codes = encode(values, grid, scheme)
    for step in (-1, 1):
        moved = (codes.int() + step).clamp(0, scheme.max_code)
        here = (decoded(codes, grid, scheme) - values).abs()
        assert bool(((decoded(moved, grid, scheme) - values).abs() >= here - 1e-12).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_nan_and_infinity_are_refused(bad, clip):
    with pytest.raises(NumericalError, match="NaN or infinity"):
        make_grid(torch.tensor([[1.0, bad]]), Scheme(4, None), torch.float32, clip)


def test_a_scale_that_overflows_float16_is_refused_and_fits_bfloat16():
    values = torch.tensor([[1e6, -3.0]])
    with pytest.raises(NumericalError, match="does not fit torch.float16"):
        make_grid(values, Scheme(4, None), torch.float16, "none")
    assert bool(
        torch.isfinite(make_grid(values, Scheme(4, None), torch.bfloat16, "none").scales).all()
    )


def test_integer_scales_are_refused():
    with pytest.raises(BadInputError, match="int32"):
        make_grid(torch.ones(1, 2), Scheme(4, None), torch.int32, "none")


def grouped_problem(rows=9, groups=3, columns=8, seed=0):
    """Weights ``(rows, groups, columns)`` and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(500, groups * columns, generator=generator)
    mix = torch.randn(groups * columns, groups * columns, generator=generator)
    energy = torch.exp(torch.randn(groups * columns, generator=generator))
    inputs = inputs @ mix * energy
    return torch.randn(rows, groups, columns, generator=generator), inputs.T @ inputs


def output_errors(values, grid, scheme, moments):
    rest = decoded(encode(values, grid, scheme), grid, scheme) - values.double()
    return torch.einsum("rgi,gij,rgj->rg", rest, moments.double(), rest)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_clipping_by_activation_lowers_the_error_of_the_output(symmetric, bits):
    values, hessian = grouped_problem()
    scheme, moments = Scheme(bits, 8, symmetric), group_moments(hessian, 8)
    totals = {}
    for clip in ("none", "mse", "activation"):
        grid = make_grid(values, scheme, torch.float32, clip, moments)
        totals[clip] = output_errors(values, grid, scheme, moments)
    assert bool((totals["activation"] <= totals["none"] * 1.0001).all())
    assert bool((totals["activation"] <= totals["mse"] * 1.0001).all())
    assert float(totals["activation"].sum()) < 0.8 * float(totals["mse"].sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("hessian", [torch.eye(24), torch.zeros(24, 24)])
def test_without_correlation_clipping_by_activation_is_by_squared_error(symmetric, hessian):
    values, _ = grouped_problem(seed=3)
    scheme = Scheme(3, 8, symmetric)
    found = make_grid(values, scheme, torch.float32, "activation", group_moments(hessian, 8))
    expected = make_grid(values, scheme, torch.float32, "mse")
    assert torch.equal(found.scales, expected.scales)
    assert symmetric or torch.equal(found.zero_points, expected.zero_points)


def test_moments_follow_the_order_that_columns_are_dealt_out_in():
    _, hessian = grouped_problem()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    found = group_moments(hessian, 8, order)
    for group in range(3):
        members = order[8 * group : 8 * group + 8]
        block = hessian[members][:, members]
        damped = block + 0.01 * block.diagonal().mean() * torch.eye(8)
        torch.testing.assert_close(found[group], damped)
