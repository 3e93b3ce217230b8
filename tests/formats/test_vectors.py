import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.formats.independent import RawShards
from llmopt.quantization.scheme import Scheme

VECTORS = sorted((Path(__file__).parent / "vectors").glob("*.json"))


def words(rows: list[list[str]]) -> torch.Tensor:
    return torch.from_numpy(
        np.array([[int(w, 16) for w in row] for row in rows], np.uint32).view(np.int32)
    )


def stored_tensors(vector: dict) -> dict[str, torch.Tensor]:
    tensors = {
        "m.weight_packed": words(vector["weight_packed"]),
        "m.weight_scale": torch.tensor(vector["scales"], dtype=torch.bfloat16),
        "m.weight_shape": torch.tensor(vector["weight_shape"]),
    }
    if vector["weight_zero_point"]:
        tensors["m.weight_zero_point"] = words(vector["weight_zero_point"])
    if vector["weight_g_idx"]:
        tensors["m.weight_g_idx"] = torch.tensor(vector["weight_g_idx"], dtype=torch.int32)
    return tensors


@pytest.fixture(params=VECTORS, ids=lambda path: path.stem)
def vector(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def scheme_of(vector: dict) -> Scheme:
    return Scheme(
        vector["bits"], vector["group_size"], vector["symmetric"], vector["activation_order"]
    )


def test_there_are_vectors():
    assert len(VECTORS) == 9


def test_a_word_is_the_sum_of_its_shifted_codes(vector):
    bits = vector["bits"]
    for codes, row in zip(vector["codes"], vector["weight_packed"], strict=True):
        stream = sum(code << (bits * place) for place, code in enumerate(codes))
        assert row == [f"{stream >> (32 * i) & 0xFFFFFFFF:08x}" for i in range(len(row))]


def test_the_format_reads_and_writes_a_vector(vector):
    form, stored = CompressedTensors(), stored_tensors(vector)
    tensor = form.unpack("m", stored.__getitem__, scheme_of(vector))
    assert tensor.codes.tolist() == vector["codes"]
    assert (None if tensor.zero_points is None else tensor.zero_points.tolist()) == vector[
        "zero_points"
    ]
    assert tensor.dequantize().tolist() == vector["weight"]
    assert tensor.digest() == vector["digest"]
    packed = form.pack("m", tensor)
    assert packed.keys() == stored.keys()
    assert all(torch.equal(packed[name], stored[name]) for name in stored)


def test_the_independent_decoder_reads_a_vector(vector, tmp_path):
    save_file(stored_tensors(vector), tmp_path / "model.safetensors")
    shards = RawShards([tmp_path / "model.safetensors"])
    decoded = shards.decode("m", vector["bits"], vector["symmetric"])
    assert decoded.codes.tolist() == vector["codes"]
    assert decoded.scales.tolist() == vector["scales"]
    assert decoded.digest() == vector["digest"]


def test_the_library_dequantizes_a_vector_alike(vector):
    if vector["weight_g_idx"]:  # the installed library reads no group index: permute for it
        order = np.argsort(vector["weight_g_idx"], kind="stable")
    else:
        order = np.arange(len(vector["codes"][0]))
    stored = stored_tensors(vector)
    if vector["weight_g_idx"]:
        codes = torch.tensor(vector["codes"], dtype=torch.uint8)[:, torch.from_numpy(order)]
        ordered = CompressedTensors().unpack("m", stored.__getitem__, scheme_of(vector))
        replaced = type(ordered)(
            codes, ordered.scales, None, None, Scheme(vector["bits"], vector["group_size"])
        )
        stored = CompressedTensors().pack("m", replaced)
    local = {name.removeprefix("m."): tensor for name, tensor in stored.items()}
    section = CompressedTensors().config(
        {"m": Scheme(vector["bits"], vector["group_size"], vector["symmetric"])}, []
    )
    scheme = QuantizationScheme.model_validate(section["config_groups"]["group_0"])
    weight = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    assert weight.tolist() == np.array(vector["weight"])[:, order].tolist()
