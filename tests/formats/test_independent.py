import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from llmopt.errors import RoundTripError
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.formats.independent import DecodedWeight, RawShards, find_decoder
from llmopt.quantization.gptq import GPTQOptions, gptq
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import INT_BITS, Scheme

FORM = CompressedTensors()
DECODER = find_decoder({"quant_method": "compressed-tensors", "format": "pack-quantized"})
GROUPED = Scheme(4, 32, False, "group")


def decode(paths, scheme: Scheme) -> DecodedWeight:
    return DECODER.decode(RawShards(paths), "m", scheme)


def packed_weight(scheme: Scheme, dtype: torch.dtype, rows: int = 9, columns: int = 96):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    if scheme.activation_order == "none":
        tensor = rtn(weight, scheme, scale_dtype=dtype)
    else:
        inputs = torch.randn(200, columns) * torch.linspace(0.1, 2, columns)
        tensor = gptq(weight, inputs.T @ inputs, scheme, GPTQOptions(), dtype).tensor
    return tensor, FORM.pack("m", tensor)


@pytest.mark.parametrize("bits", INT_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_finds_the_digest_that_was_calibrated(bits, symmetric, group_size, dtype, tmp_path):
    scheme = Scheme(bits, group_size, symmetric)
    tensor, packed = packed_weight(scheme, dtype, columns=96)
    save_file({"norm.weight": torch.ones(3)} | packed, tmp_path / "x.safetensors")
    assert DECODER.packed_modules(RawShards([tmp_path / "x.safetensors"])) == ("m",)
    assert decode([tmp_path / "x.safetensors"], scheme).digest() == tensor.digest()


def test_it_reads_a_group_index(tmp_path):
    tensor, packed = packed_weight(GROUPED, torch.bfloat16)
    save_file(packed, tmp_path / "x.safetensors")
    assert decode([tmp_path / "x.safetensors"], GROUPED).digest() == tensor.digest()


@pytest.mark.parametrize(
    "part", ["weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"]
)
def test_one_changed_bit_changes_the_digest(part, tmp_path):
    tensor, packed = packed_weight(GROUPED, torch.float32)
    digest = tensor.digest()
    packed[f"m.{part}"].view(torch.uint8).view(-1)[0] ^= 1
    save_file(packed, tmp_path / "x.safetensors")
    assert decode([tmp_path / "x.safetensors"], GROUPED).digest() != digest


def test_parts_may_lie_in_several_shards(tmp_path):
    tensor, packed = packed_weight(Scheme(3, None), torch.float16)
    paths = []
    for index, (name, part) in enumerate(packed.items()):
        paths.append(tmp_path / f"{index}.safetensors")
        save_file({name: part}, paths[-1])
    assert decode(paths, Scheme(3, None)).digest() == tensor.digest()


def test_zero_points_must_be_there_exactly_when_owed(tmp_path):
    _, packed = packed_weight(Scheme(4, 32, False), torch.float16)
    save_file(packed, tmp_path / "x.safetensors")
    with pytest.raises(RoundTripError, match="weight_zero_point is not owed"):
        decode([tmp_path / "x.safetensors"], Scheme(4, 32))
    with pytest.raises(RoundTripError, match="weight_g_idx is missing"):
        decode([tmp_path / "x.safetensors"], GROUPED)


def test_too_few_words_are_noticed(tmp_path):
    _, packed = packed_weight(Scheme(4, 32), torch.float16)
    save_file(packed, tmp_path / "x.safetensors")
    with pytest.raises(RoundTripError, match="cannot hold"):
        decode([tmp_path / "x.safetensors"], Scheme(8, 32))


def test_a_missing_part_and_a_name_in_two_files_are_noticed(tmp_path):
    _, packed = packed_weight(Scheme(4, 32), torch.float16)
    save_file(packed, tmp_path / "a.safetensors")
    save_file({"m.weight_scale": packed["m.weight_scale"]}, tmp_path / "b.safetensors")
    with pytest.raises(RoundTripError, match="twice"):
        RawShards([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    with pytest.raises(RoundTripError, match="weight_shape is not in the files"):
        decode([tmp_path / "b.safetensors"], Scheme(4, 32))


def test_data_beyond_the_end_of_the_file_is_noticed(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(RoundTripError, match="past the end"):
        RawShards([tmp_path / "x.safetensors"])
