import pytest
import torch

from llmopt.quantization.awq import AWQOptions, Reader, search_scales
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme

F32 = torch.float32


def problem(rows=40, columns=64, seed=0, tokens=512):
    """A weight, and inputs of which a few channels are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs[:, ::13] *= 20.0
    return torch.randn(rows, columns, generator=generator), inputs


def reader(weight, inputs, scheme=Scheme(4, 32, False)):  # noqa: B008
    return Reader(weight, 2 / len(inputs) * inputs.T @ inputs, len(inputs), scheme, F32)


def output_error(weight, inputs, scales, scheme=Scheme(4, 32, False)):  # noqa: B008
    rounded = rtn(weight * scales, scheme, scale_dtype=F32).dequantize() / scales
    return float(((weight - rounded) @ inputs.T).double().square().sum())


def unchanged(scales):
    return scales


@pytest.mark.parametrize("duo", [False, True, "both"])
def test_the_reported_ratio_is_what_rounding_the_scaled_weight_gives(duo):
    weight, inputs = problem()
    found = search_scales(
        [reader(weight, inputs)], torch.arange(64), unchanged, AWQOptions(20, duo)
    )
    before = output_error(weight, inputs, torch.ones(64))
    after = output_error(weight, inputs, found.scales)
    assert found.error_ratio == pytest.approx(after / before, rel=1e-4)
    assert found.error_ratio < 0.6 and found.alpha > 0
    assert duo == "both" or found.duo == duo
    assert float(found.scales[::13].min()) > float(found.scales[1::13].max())


def test_it_is_the_best_of_the_exponents_that_were_tried():
    weight, inputs = problem(seed=3)
    found = search_scales(
        [reader(weight, inputs)], torch.arange(64), unchanged, AWQOptions(5, False)
    )
    energy = inputs.square().mean(0).sqrt()
    errors = {}
    for step in range(6):
        scales = energy ** (step / 5)
        errors[step / 5] = output_error(weight, inputs, scales / scales.log().mean().exp())
    assert found.alpha == min(errors, key=errors.__getitem__)


def test_readers_of_different_tokens_count_by_their_tokens():
    weight, inputs = problem()
    other = inputs.flip(1)
    few, many = reader(weight, inputs[:8]), reader(weight, other)
    found = search_scales([few, many], torch.arange(64), unchanged, AWQOptions())
    alone = search_scales([many], torch.arange(64), unchanged, AWQOptions())
    assert output_error(weight, other, found.scales) < 1.1 * output_error(
        weight, other, alone.scales
    )


def test_channels_that_several_columns_share_get_one_scale():
    weight, inputs = problem()
    channels = torch.arange(16).view(2, 8).repeat_interleave(4, dim=0).reshape(-1)  # heads of 8
    found = search_scales([reader(weight, inputs)], channels, unchanged, AWQOptions())
    assert found.scales.shape == (16,)
    assert found.error_ratio == pytest.approx(
        output_error(weight, inputs, found.scales[channels])
        / output_error(weight, inputs, torch.ones(64)),
        rel=1e-4,
    )


def test_the_error_is_of_the_scales_that_can_be_folded():
    weight, inputs = problem()

    def powers_of_two(scales):
        return torch.exp2(torch.round(torch.log2(scales)))

    found = search_scales([reader(weight, inputs)], torch.arange(64), powers_of_two, AWQOptions())
    assert torch.equal(powers_of_two(found.scales), found.scales)
    before = output_error(weight, inputs, torch.ones(64))
    after = output_error(weight, inputs, found.scales)
    assert found.error_ratio == pytest.approx(after / before, rel=1e-4)


def test_where_nothing_helps_nothing_is_scaled():
    weight, inputs = problem()
    exact = torch.randint(0, 2, (9, 64)).float() * 15 - 5  # on its own grid
    for given, seen in ((exact, inputs), (weight, torch.zeros(4, 64))):
        found = search_scales([reader(given, seen)], torch.arange(64), unchanged, AWQOptions())
        assert (found.alpha, found.error_ratio) == (0.0, 1.0)
        assert torch.equal(found.scales, torch.ones(64))


def test_tall_weights_are_measured_on_some_rows():
    weight, inputs = problem(rows=2100)
    found = search_scales([reader(weight, inputs)], torch.arange(64), unchanged, AWQOptions())
    before = output_error(weight, inputs, torch.ones(64))
    assert found.error_ratio == pytest.approx(
        output_error(weight, inputs, found.scales) / before, rel=0.1
    )
