"""linear_fp8 against the product, in float64, of what its codes and scales mean."""

import math

import pytest
import torch
from support.comparing import TOLERANCE, poisoned, relative_error

from llmopt_kernels.linear_fp8 import (
    FP8,
    Fp8Config,
    Fp8Weight,
    candidate_configs,
    launch_linear_fp8,
    linear_fp8,
    linear_fp8_reference,
    quantize_weight,
    shipped_config,
)
from llmopt_kernels.quantize_rows import quantize_rows_reference

GPU = torch.cuda.is_available()
OUT_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Hopper's fp8 units keep about 14 bits of a sum between its moves to float32; and a division there
# may be off by its last bit, which tips a code on a tie.
LOOSENED = 1e-3 if GPU else 0.0


def assert_close(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative_error(found, expected) <= TOLERANCE[dtype] + LOOSENED


def activations(tokens, columns, dtype, device, seed=0):
    """Rows cut out of a wider tensor, whose rest is NaN."""
    generator = torch.Generator().manual_seed(seed)
    wide = poisoned(tokens, columns + 3, dtype=dtype, device=device)
    x = torch.randn(tokens, columns, generator=generator)
    wide[:, :columns] = (x * torch.rand(tokens, 1, generator=generator) * 5).to(dtype)
    return wide[:, :columns]


def fp8_weight(rows, columns, granularity, device, seed=1):
    """A weight whose codes are cut out of a wider tensor, whose rest is NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.rand(rows, 1, generator=generator) * 2 + 0.01
    weight = quantize_weight(values, granularity)
    wide = torch.full((rows, columns + 5), 0x7F, dtype=torch.uint8)  # NaN
    wide[:, :columns] = weight.codes.view(torch.uint8)
    codes = wide.to(device).view(FP8)[:, :columns]
    return Fp8Weight(codes, weight.scales.to(device))


def scales_for(x, shared, seed=2):
    """Static scales of x for what shares one; those of tokens and groups are not contiguous."""
    groups = math.ceil(x.shape[1] / 128)
    shape = {"tensor": (1,), "token": (x.shape[0], 1), "group": (x.shape[0], groups)}[shared]
    scales = torch.rand(shape[::-1], generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.005
    return (scales.T if len(shape) == 2 else scales).to(x.device)


SHAPES = [(1, 1, 1), (3, 17, 31), (17, 40, 128), (5, 130, 300), (33, 40, 257)]


@pytest.mark.parametrize("shared", ["tensor", "token", "group"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_codes_with_scales_of_every_kind(tokens, rows, columns, granularity, shared, device):
    x = activations(tokens, columns, torch.bfloat16, device)
    x_scale = scales_for(x, shared)
    spread = x_scale.repeat_interleave(128, 1)[:, :columns] if shared == "group" else x_scale
    codes = (x.float() / spread).clamp(-448, 448).to(FP8)
    weight = fp8_weight(rows, columns, granularity, device)
    expected = (codes.double() * spread.double()) @ weight.dequantize().T
    found = launch_linear_fp8(codes, weight, x_scale=x_scale, out_dtype=torch.float32)
    assert_close(found, expected, torch.float32)
    reference = linear_fp8_reference(codes, weight, x_scale=x_scale)
    assert relative_error(reference, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("shared", [None, "tensor", "token", "group"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize(
    ("dtype", "in_loop"), [(torch.float16, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_sixteen_bit_x_is_quantized_on_the_way(dtype, granularity, shared, in_loop, device):
    x = activations(17, 300, dtype, device)
    weight = fp8_weight(40, 300, granularity, device)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    x_scale = None if shared is None else scales_for(x, shared)
    config = Fp8Config(16, 64, 128, num_warps=4, num_stages=3, quantize_in_loop=in_loop)
    found = launch_linear_fp8(x, weight, bias, x_scale=x_scale, config=config)
    assert_close(found, linear_fp8_reference(x, weight, bias, x_scale=x_scale), dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "block"])
@pytest.mark.parametrize("columns", [257, 384])
def test_however_the_product_is_cut_up(columns, granularity, swap, splits, device):
    x = activations(17, columns, torch.bfloat16, device)
    weight = fp8_weight(35, columns, granularity, device)
    bias = torch.randn(35, generator=torch.Generator().manual_seed(3)).to(device)
    expected = linear_fp8_reference(x, weight, bias)
    for in_loop in (False, True):
        config = Fp8Config(16, 32, 128, 4, 3, swap, splits, group_m=2, quantize_in_loop=in_loop)
        found = launch_linear_fp8(x, weight, bias, out_dtype=torch.float32, config=config)
        assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_tiles_copied_by_descriptors(granularity, swap, splits, device):
    wide = poisoned(17, 272, dtype=torch.bfloat16, device=device)
    wide[:, :257] = activations(17, 257, torch.bfloat16, device)
    x = wide[:, :257]
    codes = torch.full((35, 272), 0x7F, dtype=torch.uint8, device=device).view(FP8)  # NaN
    weight = fp8_weight(35, 257, granularity, device)
    codes[:, :257] = weight.codes
    weight = Fp8Weight(codes[:, :257], weight.scales)
    config = Fp8Config(16, 32, 128, 4, 3, swap, splits, quantize_in_loop=True, tma=True)
    found = launch_linear_fp8(x, weight, out_dtype=torch.float32, config=config)
    assert_close(found, linear_fp8_reference(x, weight), torch.float32)


def test_descriptors_need_rows_of_whole_sixteens_of_bytes(device):
    x = activations(3, 64, torch.bfloat16, device).contiguous()
    weight = fp8_weight(24, 64, "channel", device)
    config = Fp8Config(16, 32, 128, num_warps=4, num_stages=2, tma=True)
    with pytest.raises(ValueError, match="tma needs rows .* the stride is 69 elements of 1 bytes"):
        launch_linear_fp8(x, weight, config=config)


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
def test_every_tile_is_computed_once(group_m, device):
    x = activations(70, 64, torch.bfloat16, device)
    weight = fp8_weight(80, 64, "channel", device)
    config = Fp8Config(16, 16, 128, num_warps=4, num_stages=2, group_m=group_m)
    found = launch_linear_fp8(x, weight, out_dtype=torch.float32, config=config)
    assert_close(found, linear_fp8_reference(x, weight), torch.float32)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("bias_dtype", [*OUT_DTYPES, None])
def test_bias_and_output_of_every_element_type(bias_dtype, out_dtype, device):
    x = activations(5, 100, torch.float16, device)
    weight = fp8_weight(33, 100, "channel", device)
    bias = None if bias_dtype is None else (torch.arange(33, device=device) / 3).to(bias_dtype)
    expected = linear_fp8_reference(x, weight, bias)
    for splits in (1, 2):
        config = Fp8Config(16, 64, 128, num_warps=4, num_stages=2, splits=splits)
        found = launch_linear_fp8(x, weight, bias, out_dtype=out_dtype, config=config)
        assert_close(found, expected, out_dtype)


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_sums_may_stay_in_the_tensor_cores(granularity, device):
    x = activations(17, 300, torch.bfloat16, device)
    weight = fp8_weight(40, 300, granularity, device)
    found = launch_linear_fp8(x, weight, fast_accumulation=True)
    # Those cores keep about 14 bits, which bfloat16 hides.
    assert_close(found, linear_fp8_reference(x, weight), torch.bfloat16)


@pytest.mark.parametrize("granularity", ["channel", "block"])
@pytest.mark.parametrize("in_loop", [False, True])
def test_rows_that_are_not_ordinary(granularity, in_loop, device):
    x = activations(7, 256, torch.bfloat16, device).clone()
    x[0] = 0
    x[1, 3] = torch.finfo(torch.bfloat16).max / 1024
    x[2] *= 1e-38  # its scale is subnormal
    x[3] = -0.0
    x[4, 200] = 1e20  # all others of its group become zero
    weight = fp8_weight(40, 256, granularity, device)
    config = Fp8Config(16, 64, 128, num_warps=4, num_stages=2, quantize_in_loop=in_loop)
    found = launch_linear_fp8(x, weight, config=config)
    expected = linear_fp8_reference(x, weight)
    assert not bool(found.isnan().any()) and not bool(found[[0, 3]].any())
    for row in (1, 4, 5, 6):  # one by one: the norm of all is that of the largest
        assert relative_error(found[row], expected[row]) <= TOLERANCE[torch.bfloat16] + LOOSENED
    # A subnormal scale has few bits, and a GPU's division its own way with them.
    assert relative_error(found[2], expected[2]) <= (0.3 if GPU else TOLERANCE[torch.bfloat16])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # infinity over infinity
@pytest.mark.parametrize("granularity", ["channel", "block"])
@pytest.mark.parametrize("in_loop", [False, True])
def test_what_is_not_a_number_stays_in_its_row(granularity, in_loop, device):
    x = activations(5, 300, torch.bfloat16, device).clone()
    x[2, 290] = float("nan")
    x[4, 7] = float("inf")
    weight = fp8_weight(40, 300, granularity, device)
    config = Fp8Config(16, 64, 128, num_warps=4, num_stages=2, quantize_in_loop=in_loop)
    found = launch_linear_fp8(x, weight, config=config)
    assert bool(found[[2, 4]].isnan().all())
    expected = linear_fp8_reference(x, weight)
    assert_close(found[[0, 1, 3]], expected[[0, 1, 3]], torch.bfloat16)


def test_a_static_scale_that_is_too_small_saturates(device):
    x = activations(3, 200, torch.bfloat16, device)
    weight = fp8_weight(24, 200, "tensor", device)
    x_scale = torch.tensor([1e-5], device=device)
    expected = (x.double().sign() * 448e-5) @ weight.dequantize().T
    for in_loop in (False, True):
        config = Fp8Config(16, 64, 128, num_warps=4, num_stages=2, quantize_in_loop=in_loop)
        found = launch_linear_fp8(x, weight, x_scale=x_scale, config=config)
        # Values below the scale's last code are the difference.
        assert relative_error(found, expected) <= 0.02
        reference = linear_fp8_reference(x, weight, x_scale=x_scale)
        assert_close(found, reference, torch.bfloat16)


@pytest.mark.parametrize("scales", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])])
def test_one_scale_comes_in_three_shapes(scales, device):
    x = activations(3, 40, torch.bfloat16, device)
    weight = Fp8Weight(fp8_weight(24, 40, "tensor", device).codes, scales.to(device))
    assert weight.granularity == "tensor"
    found = launch_linear_fp8(x, weight, x_scale=scales.to(device))
    assert_close(found, linear_fp8_reference(x, weight, x_scale=scales.to(device)), torch.bfloat16)


@pytest.mark.parametrize("shared", [None, "token", "group"])
def test_leading_dimensions_are_kept(shared, device):
    x = activations(6, 200, torch.bfloat16, device)
    weight = fp8_weight(24, 200, "block" if shared is None else "channel", device)
    x_scale = None if shared is None else scales_for(x, shared)
    expected = linear_fp8_reference(x, weight, x_scale=x_scale)
    folded = None if x_scale is None else x_scale.reshape(2, 3, -1)
    found = linear_fp8(x.reshape(2, 3, 200), weight, x_scale=folded)
    assert found.shape == (2, 3, 24)
    assert_close(found.flatten(0, 1), expected, torch.bfloat16)


@pytest.mark.parametrize("x_scale", [None, torch.ones(1)])
@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_no_tokens_give_no_rows(granularity, x_scale, device):
    weight = fp8_weight(24, 200, granularity, device)
    x = torch.zeros(0, 200, dtype=torch.bfloat16, device=device)
    x_scale = None if x_scale is None else x_scale.to(device)
    assert launch_linear_fp8(x, weight, x_scale=x_scale).shape == (0, 24)
    assert linear_fp8(x.view(2, 0, 200), weight, x_scale=x_scale).shape == (2, 0, 24)
    assert linear_fp8_reference(x, weight, x_scale=x_scale).shape == (0, 24)


def test_the_operation_takes_the_reference_on_a_cpu():
    x = activations(3, 200, torch.bfloat16, "cpu")
    weight = fp8_weight(24, 200, "block", "cpu")
    bias = torch.ones(24)
    found = linear_fp8(x, weight, bias, out_dtype=torch.float32)
    assert_close(found, linear_fp8_reference(x, weight, bias), torch.float32)
    assert linear_fp8(x, weight).dtype == torch.bfloat16
    codes, scales = quantize_rows_reference(x, FP8, 128)
    assert linear_fp8(codes, weight, x_scale=scales).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("granularity", "shape", "limit"),
    [("tensor", (1, 1), 0.06), ("channel", (130, 1), 0.04), ("block", (2, 3), 0.06)],
)
def test_a_weight_is_rounded_to_what_it_was(granularity, shape, limit):
    values = torch.randn(130, 300, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(values, granularity)
    assert tuple(weight.scales.shape) == shape and weight.granularity == granularity
    assert (weight.out_features, weight.in_features) == (130, 300)
    assert relative_error(weight.dequantize(), values) < limit
    if granularity == "block":
        largest = values[128:, 256:].abs().max() / 448
        torch.testing.assert_close(weight.scales[1, 2], largest)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_candidates_begin_with_what_is_shipped_and_fit_the_problem(tokens, fast, grouped):
    for rows, columns in ((4096, 4096), (128, 512), (28672, 4096), (1, 1)):
        shipped = shipped_config(tokens, rows, columns, grouped=grouped, fast=fast)
        candidates = candidate_configs(tokens, rows, columns, grouped=grouped, fast=fast)
        assert candidates[0] == shipped and len(set(candidates)) == len(candidates)
        for config in candidates:
            assert config.block_k % 128 == 0 and config.splits >= 1
            assert not grouped or (config.block_k == 128 and 128 % config.block_n == 0)


def fitting():
    codes = torch.zeros(24, 300, dtype=FP8)
    return {
        "x": torch.zeros(3, 300, dtype=torch.bfloat16),
        "weight": Fp8Weight(codes, torch.ones(24, 1)),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 300)}, "x is float32; use bfloat16, float16, float8_e4m3fn"),
        ({"x": torch.zeros(3, 30).bfloat16()}, r"x has shape \[3, 30\]; expected \[\*, 300\]"),
        ({"x": torch.zeros(300, 3).bfloat16().T}, "x has stride 3 in its last dimension"),
        ({"x": torch.zeros(3, 300).to(FP8)}, "x is float8_e4m3fn without x_scale"),
        ({"bias": torch.zeros(25)}, r"bias has shape \[25\]; expected \[24\]"),
        ({"bias": torch.zeros(24, dtype=torch.float64)}, "bias is float64; use bfloat16"),
        ({"x_scale": torch.ones(3, 1).bfloat16()}, "x_scale is bfloat16; use float32"),
        ({"x_scale": torch.ones(3, 2)}, r"x_scale has shape \[3, 2\]; x \[3, 300\] takes \[1\],"),
        (
            {"x_scale": torch.ones(3)},
            r"x_scale has shape \[3\]; x \[3, 300\] takes \[1\], \[3, 1\]",
        ),
        ({"out_dtype": torch.int8}, "out_dtype is torch.int8; use one of torch.bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    given = {**fitting(), **changes}
    with pytest.raises(ValueError, match=words):
        launch_linear_fp8(**given)
    if "stride" not in words:  # the operation may copy
        with pytest.raises(ValueError, match=words):
            linear_fp8(**given)


@pytest.mark.parametrize(
    ("granularity", "config", "words"),
    [
        ("channel", Fp8Config(16, 16, 64, 4, 2), "block_k is 64; it must be a multiple of 128"),
        ("block", Fp8Config(16, 16, 256, 4, 2), "block_n is 16 and block_k 256; with scales by"),
        ("block", Fp8Config(16, 256, 128, 4, 2), "block_n is 256 and block_k 128; with scales by"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(granularity, config, words):
    weight = quantize_weight(torch.ones(24, 300), granularity)
    with pytest.raises(ValueError, match=words):
        launch_linear_fp8(fitting()["x"], weight, config=config)


@pytest.mark.parametrize(
    ("codes", "scales", "words"),
    [
        (torch.zeros(4, 300), torch.ones(1), "codes is float32; use float8_e4m3fn"),
        (torch.zeros(4).to(FP8), torch.ones(1), r"codes has shape \[4\]; expected \[\*, \*\]"),
        (torch.zeros(4, 30).to(FP8).T, torch.ones(1), "codes has stride 30 in its last dimension"),
        (torch.zeros(4, 300).to(FP8), torch.ones(1).half(), "scales is float16; use float32"),
        (
            torch.zeros(4, 300).to(FP8),
            torch.ones(4),
            r"scales have shape \[4\]; codes \[4, 300\] take \[1\], \[4, 1\] or, for bl.*\[1, 3\]",
        ),
    ],
)
def test_a_weight_whose_parts_do_not_fit_is_refused(codes, scales, words):
    with pytest.raises(ValueError, match=words):
        Fp8Weight(codes, scales)


@pytest.mark.skipif(not GPU, reason="real shapes need a GPU")
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 100, 2048])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (4096, 14336), (6144, 4096)])
def test_real_shapes_and_every_candidate(tokens, rows, columns, granularity):
    x = activations(tokens, columns, torch.bfloat16, "cuda").contiguous()
    weight = quantize_weight(torch.randn(rows, columns, device="cuda"), granularity)
    expected = linear_fp8_reference(x, weight)
    grouped = granularity == "block"
    for config in candidate_configs(tokens, rows, columns, grouped=grouped):
        found = launch_linear_fp8(x, weight, config=config)
        assert_close(found, expected, torch.bfloat16)
