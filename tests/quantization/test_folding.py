import pytest
import torch

from llmopt.quantization.folding import StoredValues, exact_scales

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def column(*values, dtype=torch.bfloat16):
    return torch.tensor(values, dtype=dtype).unsqueeze(1)


def wished(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(channels, generator=generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_one_value_a_channel_is_divided_by_exactly_the_scale_that_is_given_back(dtype, offset):
    values = (1 + 0.3 * torch.randn(65, 1, generator=torch.Generator().manual_seed(1))).to(dtype)
    stored, asked = StoredValues(values, offset=offset), wished(65)
    scales = exact_scales(asked, [stored])
    after = stored.scaled(scales)
    assert after.dtype is dtype
    product = (after.double() + offset) * scales.double().unsqueeze(1)
    torch.testing.assert_close(product, values.double() + offset, rtol=3e-7, atol=0)
    assert bool(((scales / asked).log().abs() < 0.05).all())


def test_a_value_that_would_leave_its_range_keeps_scale_one_and_its_bits():
    stored = StoredValues(column(2e-7, 60000.0, 0.0, 3.0, dtype=torch.float16))
    scales = exact_scales(torch.tensor([1e3, 1e-3, 5.0, 2.0]), [stored])
    assert scales.tolist() == [1.0, 1.0, 5.0, 2.0]
    assert torch.equal(stored.scaled(scales), column(2e-7, 60000.0, 0.0, 1.5, dtype=torch.float16))


def test_without_a_scale_an_offset_changes_no_bit():
    values = column(1e-9, -1e-12, 0.3)
    assert torch.equal(StoredValues(values, offset=1.0).scaled(torch.ones(3)), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_stored_tensors_take_powers_of_two_and_hold_them_exactly(dtype):
    norm = StoredValues(torch.randn(33, 1).to(dtype))
    router = StoredValues(torch.randn(33, 5).to(dtype), divided=False)
    scales = exact_scales(wished(33), [norm, router])
    assert torch.equal(torch.exp2(torch.round(torch.log2(scales))), scales)
    assert int((scales != 1).sum()) > 15
    produced = norm.scaled(scales).double() * router.scaled(scales).double()
    assert torch.equal(produced, norm.values.double() * router.values.double())


def test_a_power_of_two_that_overflows_or_loses_bits_is_not_taken():
    norm = StoredValues(column(1.0, 40000.0, 1.001, dtype=torch.float16))
    router = StoredValues(column(40000.0, 1.0, 1e-7, dtype=torch.float16), divided=False)
    scales = exact_scales(torch.tensor([4.0, 0.25, 0.1]), [norm, router])
    assert scales.tolist() == [1.0, 1.0, 1.0]


def test_where_nothing_is_stored_any_scale_is_exact():
    scales = wished(7)
    assert torch.equal(exact_scales(scales, []), scales)
