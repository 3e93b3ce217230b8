import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.formats.bitstream import pack_rows, unpack_rows

bits_and_shape = st.tuples(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 75))


def random_codes(bits: int, rows: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)


@given(case=bits_and_shape, seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_words_are_the_librarys_words_and_come_back(case, seed):
    bits, rows, count = case
    codes = random_codes(bits, rows, count, seed)
    packed = pack_rows(codes, bits)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_rows(packed, bits, count), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), signed)


@given(case=bits_and_shape, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_packing_transposed_is_the_librarys_packing_along_rows(case, seed):
    bits, rows, count = case
    codes = random_codes(bits, rows, count, seed)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_rows(codes.t(), bits).t(), pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_survives_at_every_place(bits):
    codes = torch.arange(1 << bits, dtype=torch.uint8).unsqueeze(1).repeat(1, 33)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 33), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_row_that_is_laid_out_as_a_column_packs_as_any_row(bits):
    column = random_codes(bits, 64, 1, seed=bits)
    assert torch.equal(pack_rows(column.t(), bits), pack_rows(column.reshape(1, 64), bits))
