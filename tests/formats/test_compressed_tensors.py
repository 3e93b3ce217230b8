import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

from llmopt.errors import BadInputError
from llmopt.formats import FORMATS
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.quantization.gptq import GPTQOptions, gptq
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import INT_BITS, Scheme

FORM = CompressedTensors()


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


@pytest.mark.parametrize("bits", INT_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(7, 96, 32), (33, 45, None), (65, 64, 64)]
)
def test_pack_and_unpack_are_inverse_and_the_library_agrees(
    bits, symmetric, rows, columns, group_size
):
    scheme = Scheme(bits, group_size, symmetric)
    if rows == 7 and not symmetric and bits == 4:
        rows = 9  # the library cannot read its own layout of a single word of zero points
    tensor = rtn(random_weight(rows, columns), scheme, scale_dtype=torch.bfloat16)
    packed = FORM.pack("a.b", tensor)
    assert FORM.unpack("a.b", packed.__getitem__, scheme).digest() == tensor.digest()
    assert FORM.weight_shape("a.b", packed.__getitem__, scheme) == (rows, columns)
    local = {name.removeprefix("a.b."): part for name, part in packed.items()}
    config = QuantizationConfig.model_validate(FORM.config({"a.b": scheme}, []))
    library = PackedQuantizationCompressor.decompress(local, config.config_groups["group_0"])
    assert torch.equal(library["weight"], tensor.dequantize(torch.bfloat16))


def test_a_group_index_is_stored_and_read():
    scheme = Scheme(4, 32, False, "group")
    weight, inputs = random_weight(9, 96), torch.randn(300, 96) * torch.linspace(0.1, 2, 96)
    tensor = gptq(weight, inputs.T @ inputs, scheme, GPTQOptions(), torch.float16).tensor
    packed = FORM.pack("m", tensor)
    index = packed["m.weight_g_idx"]
    assert index.dtype is torch.int32
    assert index.bincount().tolist() == [32, 32, 32]
    assert FORM.unpack("m", packed.__getitem__, scheme).digest() == tensor.digest()


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("weight_packed", (4, 3)),
        ("weight_scale", (4, 2)),
        ("weight_zero_point", (2, 1)),
        ("weight_shape", (3,)),
    ],
)
def test_a_part_of_another_shape_is_refused(part, shape):
    scheme = Scheme(4, 32, False)
    packed = FORM.pack("m", rtn(random_weight(4, 32), scheme, scale_dtype=torch.bfloat16))
    packed[f"m.{part}"] = packed[f"m.{part}"].new_zeros(shape)
    with pytest.raises(BadInputError, match=part):
        FORM.unpack("m", packed.__getitem__, scheme)


def test_tensor_names_are_recognised_and_one_leads():
    assert FORM.weight_name("a.b.weight_packed") == ("a.b", True)
    assert FORM.weight_name("a.b.weight_g_idx") == ("a.b", False)
    assert FORM.weight_name("a.b.weight") is None
    assert FORM.weight_name("a.weight_scale.bias") is None


def test_one_scheme_targets_the_class_and_lists_what_is_left_out():
    config = FORM.config({"a.x": Scheme(4, 32), "a.y": Scheme(4, 32)}, ["lm_head"])
    assert config["ignore"] == ["lm_head"]
    assert list(config["config_groups"]) == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    table = FORM.schemes(config)
    assert table.scheme_of("a.x") == Scheme(4, 32)
    assert table.scheme_of("lm_head") is None


def test_mixed_schemes_target_names_and_come_back():
    schemes = {
        "a.x": Scheme(4, 32),
        "a.y": Scheme(8, None, False),
        "a.z": Scheme(4, 32),
        "b.x": Scheme(3, 64, True, "weight"),
        "b.y": Scheme(4, 32, True, "group"),
    }
    config = FORM.config(schemes, ["b.z", "lm_head"])
    assert len(config["config_groups"]) == 4
    assert config["config_groups"]["group_0"]["targets"] == ["a.x", "a.z"]
    table = FORM.schemes(config)
    assert {name: table.scheme_of(name) for name in schemes} == schemes
    assert table.scheme_of("b.z") is None
    assert table.scheme_of("a.xx") is None


def test_patterns_and_names_win_over_the_class():
    config = FORM.config({"a": Scheme(4, 32)}, ["re:.*vision"])
    group = config["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {
        **group,
        "targets": ["re:.*down"],
        "weights": {**group["weights"], "num_bits": 8},
    }
    config["config_groups"]["group_2"] = {
        **group,
        "targets": ["c.down"],
        "weights": {**group["weights"], "num_bits": 2},
    }
    table = FORM.schemes(config)
    assert table.scheme_of("a.up") == Scheme(4, 32)
    assert table.scheme_of("a.down") == Scheme(8, 32)
    assert table.scheme_of("c.down") == Scheme(2, 32)
    assert table.scheme_of("x.vision.down") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"format": "int-quantized"}, "int-quantized"),
        ({"weights": {"num_bits": 5}}, "5-bit"),
        ({"weights": {"type": "float"}}, "float"),
        ({"weights": {"strategy": "block"}}, "block"),
        ({"input_activations": {"num_bits": 8}}, "input activations"),
    ],
)
def test_configs_that_are_not_ours_are_refused(change, message):
    config = FORM.config({"a": Scheme(4, 32)}, [])
    group = config["config_groups"]["group_0"]
    for key, value in change.items():
        if key == "weights":
            group["weights"].update(value)
        elif key == "quant_method":
            config[key] = value
        else:
            group[key] = value
    with pytest.raises(BadInputError, match=message):
        FORM.schemes(config)


def test_a_config_needs_layers_and_no_contradiction():
    with pytest.raises(BadInputError, match="no linear layer"):
        FORM.config({}, ["lm_head"])
    with pytest.raises(BadInputError, match="both quantized and ignored"):
        FORM.config({"lm_head": Scheme()}, ["lm_head"])


def test_what_it_cannot_hold_is_refused_with_a_reason():
    assert "one group only" in (FORM.refusal(Scheme(4, None, True, "group")) or "")
    assert all(FORM.refusal(Scheme(bits, 32, False, "group")) is None for bits in INT_BITS)


def test_the_registry_knows_it_by_name():
    assert all(form.name == name for name, form in FORMATS.items())
