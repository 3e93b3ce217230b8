"""rope against its float64 reference."""

import pytest
import torch
from support.comparing import TOLERANCE, relative_error
from support.far_apart import far_apart

from llmopt_kernels.rope import launch_rope, rope, rope_reference


def problem(tokens, heads, head_dim, rotary_dim, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Heads are cut out of a wider row, as q and k are out of a fused projection.
    wide = torch.randn(tokens, heads + 2, head_dim, generator=generator).to(dtype)
    angles = torch.rand(50, rotary_dim // 2, generator=generator) * 6
    positions = torch.randint(0, 50, (tokens,), generator=generator, dtype=torch.int32)
    parts = (wide, positions, angles.cos(), angles.sin())
    wide, positions, cos, sin = (part.to(device) for part in parts)
    return wide, positions, cos, sin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "rotary_dim"),
    [(1, 1, 64, 64), (17, 3, 80, 80), (5, 9, 96, 32), (2, 16, 128, 128), (0, 4, 64, 64)],
)
def test_it_rotates_in_place_and_touches_nothing_else(
    tokens, heads, head_dim, rotary_dim, dtype, device
):
    wide, positions, cos, sin = problem(tokens, heads, head_dim, rotary_dim, dtype, device)
    before = wide.clone()
    x = wide[:, 1:-1]
    expected = rope_reference(x, positions, cos, sin)
    launch_rope(x, positions, cos, sin)
    assert relative_error(x, expected) <= TOLERANCE[dtype]
    assert torch.equal(wide[:, 0], before[:, 0]) and torch.equal(wide[:, -1], before[:, -1])
    assert torch.equal(x[..., rotary_dim:], before[:, 1:-1, rotary_dim:])


def test_the_operation_takes_the_reference_on_a_cpu():
    wide, positions, cos, sin = problem(3, 2, 64, 64, torch.bfloat16, "cpu")
    expected = rope_reference(wide, positions, cos, sin)
    assert rope(wide, positions, cos, sin) is wide
    assert relative_error(wide, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("dim", [-3, -2], ids=["tokens", "heads"])
def test_indices_beyond_32_bits(dim, device):
    wide, positions, cos, sin = problem(3, 1, 64, 64, torch.bfloat16, device)
    (x,) = far_apart([wide], dim)
    expected = rope_reference(x, positions, cos, sin)
    launch_rope(x, positions, cos, sin)
    assert relative_error(x, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("heads", "rotary_dim"), [(0, 64), (2, 0)])
def test_nothing_to_rotate(heads, rotary_dim, device):
    x = torch.ones(3, heads, 64, device=device)
    tables = torch.zeros(50, rotary_dim // 2, device=device)
    launch_rope(x, torch.zeros(3, dtype=torch.int32, device=device), tables, tables)
    assert bool((x == 1).all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 2, 64, dtype=torch.float64)}, "x is float64; use bfloat16"),
        ({"x": torch.zeros(3, 64)}, r"x has shape \[3, 64\]; expected \[\*, \*, \*\]"),
        ({"x": torch.zeros(3, 64, 2).transpose(1, 2)}, "stride 2 in its last dimension"),
        ({"x": torch.zeros(1, 2, 64).expand(3, 2, 64)}, r"x has strides \(0, 64, 1\)"),
        ({"x": torch.zeros(3, 2, 32)}, "tables rotate 64 channels, x has 32"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, r"positions has shape \[4\]"),
        ({"positions": torch.zeros(6, dtype=torch.int32)[::2]}, r"positions has strides \(2,\)"),
        ({"sin": torch.zeros(50, 16)}, r"sin has shape \[50, 16\]; expected \[50, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    wide, positions, cos, sin = problem(3, 2, 64, 64, torch.bfloat16, "cpu")
    given = {"x": wide, "positions": positions, "cos": cos, "sin": sin, **changes}
    with pytest.raises(ValueError, match=words):
        launch_rope(**given)


@pytest.mark.parametrize(
    ("position", "words"),
    [(50, r"positions\[1\] is 50; the tables have 50 rows"), (-1, r"positions\[1\] is -1;")],
)
def test_a_position_without_a_row_is_refused_where_values_are_checked(position, words):
    wide, positions, cos, sin = problem(3, 2, 64, 64, torch.bfloat16, "cpu")
    rope(wide, positions, cos, sin, check_values=True)
    positions[1] = position
    with pytest.raises(ValueError, match=words):
        rope(wide, positions, cos, sin, check_values=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(32, 128, 128), (8, 192, 64)])
def test_real_shapes(heads, head_dim, rotary_dim, dtype, device):
    wide, positions, cos, sin = problem(4099, heads, head_dim, rotary_dim, dtype, device)
    x = wide[:, 1:-1]
    expected = rope_reference(x, positions, cos, sin)
    launch_rope(x, positions, cos, sin)
    assert relative_error(x, expected) <= TOLERANCE[dtype]
