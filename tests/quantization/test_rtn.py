import pytest
import torch

from llmopt.errors import BadInputError
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme
from llmopt.quantization.storage import stored_bits_per_weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_every_weight_is_within_a_step_of_its_group(bits, symmetric, group_size):
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor = rtn(weight, Scheme(bits, group_size, symmetric), scale_dtype=torch.bfloat16)
    groups = 96 // (group_size or 96)
    assert tensor.scales.shape == (5, groups)
    assert tensor.scales.dtype is torch.bfloat16
    assert tensor.codes.dtype is torch.uint8
    assert int(tensor.codes.max()) <= tensor.scheme.max_code
    assert (tensor.zero_points is None) == symmetric
    steps = tensor.scales.float().repeat_interleave(96 // groups, dim=1)
    assert bool(((tensor.dequantize() - weight.float()).abs() <= 1.02 * steps).all())


def test_groups_are_rounded_independently():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    changed = weight.clone()
    changed[:, 40] = 50.0
    scheme = Scheme(4, 32)
    before = rtn(weight, scheme, scale_dtype=torch.float32).dequantize()
    after = rtn(changed, scheme, scale_dtype=torch.float32).dequantize()
    assert torch.equal(before[:, :32], after[:, :32])
    assert not torch.equal(before[:, 32:40], after[:, 32:40])


def test_eight_bits_per_channel_is_close():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(3))
    tensor = rtn(weight, Scheme(8, None), scale_dtype=torch.float32)
    assert (
        float((tensor.dequantize() - weight).abs().max()) <= float(weight.abs().max()) / 255 + 1e-6
    )


def test_the_source_is_not_changed():
    weight = torch.randn(4, 32)
    copy = weight.clone()
    rtn(weight, Scheme(4, 32, False), clip="mse", scale_dtype=torch.float16)
    assert torch.equal(weight, copy)


@pytest.mark.parametrize(
    ("weight", "scheme", "message"),
    [
        (torch.ones(4), Scheme(4, None), "shape"),
        (torch.ones(0, 4), Scheme(4, None), "shape"),
        (torch.ones(2, 4, dtype=torch.int32), Scheme(4, None), "int32"),
        (torch.ones(2, 48), Scheme(4, 32), "does not divide"),
        (torch.ones(2, 32), Scheme(4, 32, True, "group"), "activation order"),
    ],
)
def test_what_does_not_fit_is_refused(weight, scheme, message):
    with pytest.raises(BadInputError, match=message):
        rtn(weight, scheme, scale_dtype=torch.float32)


def test_stored_bits_count_words_scales_zero_points_and_group_index():
    assert stored_bits_per_weight(Scheme(4, 128), (256, 256), torch.bfloat16) == 4.125
    assert stored_bits_per_weight(Scheme(4, 128, False), (256, 256), torch.bfloat16) == 4.15625
    assert stored_bits_per_weight(Scheme(3, None), (8, 33), torch.float32) == (128 + 32) / 33
    grouped = Scheme(4, 32, True, "group")
    assert stored_bits_per_weight(grouped, (16, 32), torch.float16) == 4 + 0.5 + 2


def test_clipping_by_activation_needs_a_hessian():
    with pytest.raises(BadInputError, match="calibration text"):
        rtn(torch.ones(2, 32), Scheme(4, 32), clip="activation", scale_dtype=torch.float32)
