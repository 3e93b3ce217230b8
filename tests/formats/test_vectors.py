import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

from llmopt.formats import FORMATS, read_format
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.formats.independent import RawShards, find_decoder
from llmopt.quantization.scheme import Scheme

FOLDER = Path(__file__).parent / "vectors"
VECTORS = sorted(FOLDER.glob("*/*.json"))
LIBRARY = sorted(FOLDER.glob("compressed-tensors/*.json"))
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(rows: list[list[str]]) -> torch.Tensor:
    return torch.from_numpy(
        np.array([[int(w, 16) for w in row] for row in rows], np.uint32).view(np.int32)
    )


def stored_tensors(vector: dict) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, part in vector["parts"].items():
        if name in ("weight_scale", "scales"):
            tensors[f"m.{name}"] = torch.tensor(part, dtype=torch.bfloat16)
        elif name in ("weight_g_idx", "g_idx"):
            tensors[f"m.{name}"] = torch.tensor(part, dtype=torch.int32)
        else:
            tensors[f"m.{name}"] = torch.tensor(part) if name == "weight_shape" else words(part)
    return tensors


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=VECTORS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def vector(request) -> dict:
    return load(request.param)


def scheme_of(vector: dict) -> Scheme:
    return Scheme(
        vector["bits"], vector["group_size"], vector["symmetric"], vector["activation_order"]
    )


def test_there_are_vectors_of_every_format():
    count = {folder.name: len(list(folder.glob("*.json"))) for folder in FOLDER.iterdir()}
    assert count == {"compressed-tensors": 9, "gptq": 6, "gptq_v2": 3, "awq": 3}
    assert {load(path)["quantization_config"]["quant_method"] for path in VECTORS} == set(FORMATS)


def hex_words(codes: list[int], bits: int) -> list[str]:
    """Codes as one number, the first lowest, cut into words."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    return [f"{stream >> (32 * i) & 0xFFFFFFFF:08x}" for i in range(-(-len(codes) * bits // 32))]


def columns(rows: list[list]) -> list[list]:
    return [list(column) for column in zip(*rows, strict=True)]


def interleaved(codes: list[int]) -> list[int]:
    return [codes[start + i] for start in range(0, len(codes), 8) for i in AWQ_ORDER]


def test_a_word_is_the_sum_of_its_shifted_codes(vector):
    """The bytes, spelled out from the description of each format."""
    bits, config, parts = vector["bits"], vector["quantization_config"], vector["parts"]
    groups = len(vector["scales"][0])
    midpoint = 1 << (bits - 1)
    zeros = vector["zero_points"] or [[midpoint] * groups for _ in vector["codes"]]
    trivial = [j * groups // len(vector["codes"][0]) for j in range(len(vector["codes"][0]))]
    if config["quant_method"] == "compressed-tensors":
        expected = {
            "weight_packed": [hex_words(row, bits) for row in vector["codes"]],
            "weight_scale": vector["scales"],
            "weight_shape": [len(vector["codes"]), len(trivial)],
        }
        if vector["zero_points"]:
            packed = [hex_words(column, bits) for column in columns(zeros)]
            expected["weight_zero_point"] = columns(packed)
        if vector["group_index"]:
            expected["weight_g_idx"] = vector["group_index"]
    elif config["quant_method"] == "gptq":
        less = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
        stored = [[zero - less for zero in column] for column in columns(zeros)]
        expected = {
            "qweight": columns([hex_words(row, bits) for row in vector["codes"]]),
            "qzeros": [hex_words(column, bits) for column in stored],
            "scales": columns(vector["scales"]),
            "g_idx": vector["group_index"] or trivial,
        }
    else:
        expected = {
            "qweight": [hex_words(interleaved(col), 4) for col in columns(vector["codes"])],
            "qzeros": [hex_words(interleaved(col), 4) for col in columns(zeros)],
            "scales": columns(vector["scales"]),
        }
    assert parts == expected


def test_the_format_reads_and_writes_a_vector(vector):
    form, stored = read_format(vector["quantization_config"]), stored_tensors(vector)
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


def test_the_config_of_a_vector_means_its_scheme(vector):
    scheme, config = scheme_of(vector), vector["quantization_config"]
    found = read_format(config).schemes(config).scheme_of("m")
    assert found is not None
    if config["quant_method"] == "awq":  # its files always have zero points
        assert not found.symmetric and found.group_size == scheme.group_size
    else:
        assert found == scheme


def test_the_independent_decoder_reads_a_vector(vector, tmp_path):
    save_file(stored_tensors(vector), tmp_path / "model.safetensors")
    shards = RawShards([tmp_path / "model.safetensors"])
    decoder = find_decoder(vector["quantization_config"])
    assert decoder.packed_modules(shards) == ("m",)
    decoded = decoder.decode(shards, "m", scheme_of(vector))
    assert decoded.codes.tolist() == vector["codes"]
    assert decoded.scales.tolist() == vector["scales"]
    assert decoded.digest() == vector["digest"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_the_library_dequantizes_a_vector_alike(path):
    vector = load(path)
    stored = stored_tensors(vector)
    order = np.arange(len(vector["codes"][0]))
    if vector["group_index"]:  # the installed library reads no group index: permute for it
        order = np.argsort(vector["group_index"], kind="stable")
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
