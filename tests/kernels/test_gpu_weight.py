"""The layout of the Triton kernel: what it means, that nothing is lost, what it refuses."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_weights import random_weight

from llmopt_kernels.gpu_weight import from_gpu_weight, gpu_weight_refusal, to_gpu_weight


def assert_same(found, expected):
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        else:
            assert one == other, field.name


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([1, 2, 5, 128, 130]),
    st.integers(1, 6),
    st.sampled_from([32, 64, 96, 128]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost(bits, out, groups, group_size, asymmetric, indexed, seed):
    _, weight = random_weight(
        out,
        groups * group_size,
        groups,
        bits=bits,
        asymmetric=asymmetric,
        indexed=indexed,
        seed=seed,
    )
    laid_out = to_gpu_weight(weight)
    assert laid_out.group_size == group_size
    assert_same(from_gpu_weight(laid_out), weight)
    part = from_gpu_weight(laid_out, out // 2, out + 5)
    assert torch.equal(part.packed, weight.packed[out // 2 :])
    assert torch.equal(part.scales, weight.scales[out // 2 :])


@pytest.mark.parametrize(("bits", "group_size", "plane"), [(4, 128, 64), (4, 96, 32), (8, 64, 64)])
@pytest.mark.parametrize("indexed", [False, True])
def test_where_each_code_lies(bits, group_size, plane, indexed):
    codes, weight = random_weight(3, 2 * group_size, 2, bits=bits, indexed=indexed, asymmetric=True)
    laid_out = to_gpu_weight(weight)
    chunk = plane * 16 // bits
    assert (laid_out.plane, laid_out.chunk) == (plane, chunk)
    assert laid_out.packed.shape == (-(-2 * group_size // chunk), 128, plane // 2)
    order = range(2 * group_size) if laid_out.column_order is None else laid_out.column_order
    for row in range(3):
        for place, column in enumerate(order):
            index, within = divmod(place % chunk, plane)
            word = int(laid_out.packed[place // chunk, row, within // 2])
            shift = within % 2 * 16 + index * bits
            assert word >> shift & ((1 << bits) - 1) == codes[row, column]
        zeros = [int(laid_out.zero_points[0, row]) >> 8 * group & 0xFF for group in range(2)]
        assert zeros == weight.zero_points[row].tolist()


def test_groups_come_together():
    _, weight = random_weight(3, 128, 4, indexed=True)
    groups = weight.group_index[to_gpu_weight(weight).column_order]
    assert groups.tolist() == sorted(groups.tolist())


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (random_weight(8, 64, 1, bits=3)[1], "3 bits"),
        (random_weight(8, 64, 1, bits=2)[1], "2 bits"),
        (random_weight(8, 96, 2)[1], "2 groups in 96 columns"),
        (random_weight(8, 80, 1)[1], "1 groups in 80 columns"),
        (
            replace(
                random_weight(8, 64, 2, indexed=True)[1],
                group_index=torch.arange(64, dtype=torch.int32) // 33,
            ),
            "groups of unequal size",
        ),
    ],
)
def test_what_the_kernel_cannot_hold_is_refused(weight, reason):
    assert reason in gpu_weight_refusal(weight)
    with pytest.raises(ValueError, match=reason):
        to_gpu_weight(weight)
