import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.ggml.random_blocks import random_bytes

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.ggml.packing import pack_blocks, pack_plain, unpack_blocks, unpack_plain
from llmopt.quantization.ggml.types import GGML_TYPES

BLOCK_TYPES = [kind for kind in GGML_TYPES.values() if not kind.is_plain]


def named(kind):
    return kind.name


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_any_bytes_are_found_again(kind, rows, blocks, seed):
    # Scales that are NaN or infinite included: a file's bytes are not ours to mend.
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * kind.block_bytes)
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    tensor = unpack_blocks(data, kind, blocks * kind.block_size)
    assert tensor.shape == (rows, blocks * kind.block_size)
    assert int(tensor.codes.max()) <= kind.max_code
    assert torch.equal(pack_blocks(tensor), data)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_bytes_mean_what_the_gguf_package_says(kind, rows, blocks, seed):
    data = random_bytes(kind, rows, blocks, seed)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name])
    ours = unpack_blocks(data, kind, blocks * kind.block_size).dequantize().numpy()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
def test_parts_are_within_the_limits_of_the_type(kind):
    data = random_bytes(kind, 64, 4, seed=1)
    tensor = unpack_blocks(data, kind, 4 * kind.block_size)
    assert tensor.scales.dtype is torch.float16 and tensor.scales.shape == (64, 4)
    assert (tensor.mins is None) == (kind.min_sign == 0)
    assert (tensor.sub_scales is None) == (kind.sub_scale_limits is None)
    if tensor.sub_scales is not None:
        assert tensor.sub_scales.shape == (64, 4 * kind.sub_blocks)
        lowest, highest = kind.sub_scale_limits
        assert (int(tensor.sub_scales.min()), int(tensor.sub_scales.max())) == (lowest, highest)
    assert (tensor.sub_mins is None) == (kind.sub_min_limit is None)
    if tensor.sub_mins is not None:
        assert (int(tensor.sub_mins.min()), int(tensor.sub_mins.max())) == (0, kind.sub_min_limit)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_are_cast(name):
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    data = pack_plain(weight, GGML_TYPES[name])
    assert data.shape == (3, GGML_TYPES[name].row_bytes(7))
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(unpack_plain(data, GGML_TYPES[name]).float(), torch.from_numpy(theirs))
    assert torch.equal(
        torch.from_numpy(theirs), weight.to(unpack_plain(data, GGML_TYPES[name]).dtype).float()
    )


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(NumericalError, match="70000"):
        pack_plain(torch.tensor([[1.0, 7e4]]), GGML_TYPES["F16"])


@pytest.mark.parametrize(
    ("shape", "dtype", "in_features", "words"),
    [
        ((2, 143), torch.uint8, 256, "rows of 144 bytes"),
        ((2, 144), torch.int8, 256, "rows of 144 bytes"),
        ((144,), torch.uint8, 256, "rows of 144 bytes"),
        ((2, 144), torch.uint8, 128, "rows of 128"),
        ((2, 0), torch.uint8, 0, "rows of 0"),
    ],
)
def test_bytes_that_are_no_rows_are_refused(shape, dtype, in_features, words):
    with pytest.raises(BadInputError, match=words):
        unpack_blocks(torch.zeros(shape, dtype=dtype), GGML_TYPES["Q4_K"], in_features)


def test_plain_types_have_no_blocks():
    with pytest.raises(BadInputError, match="unpack_plain"):
        unpack_blocks(torch.zeros(1, 4, dtype=torch.uint8), GGML_TYPES["F32"], 1)
