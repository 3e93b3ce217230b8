"""Directories as other tools leave them: inspected, loaded, converted, or refused with a reason."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.quantized import WIDTHS, write_quantized
from support.tiny_models import llama_config, rewrite_config, rewrite_tensors, write_checkpoint

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.comparison import compare
from llmopt.converting import convert
from llmopt.errors import BadInputError
from llmopt.formats import FORMATS
from llmopt.formats.config_file import quantization_config
from llmopt.formats.dequantized import DequantizedSource
from llmopt.formats.parts import count_groups
from llmopt.inspection import inspect_path
from llmopt.loading import load
from llmopt.quantization.scheme import Scheme

ASYMMETRIC = Scheme(4, 32, symmetric=False)
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(24).view(2, 12)


def edit_section(folder: Path, **changes: object) -> None:
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    rewrite_config(folder, quantization_config={**section, **changes})


def expect_readable(folder: Path, written: dict, scheme: Scheme) -> None:
    """Inspect, dequantize and load it; the logits are those of the codes that were written."""
    assert inspect_path(folder).schemes == {scheme.label: len(written)}
    source = DequantizedSource(open_checkpoint(folder))
    assert source.read_quantized(UP).digest() == written[UP].digest()
    model = load(folder, dtype=torch.float32)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.get_submodule(UP)(hidden)
        assert torch.isfinite(model(TOKENS).logits).all()
    torch.testing.assert_close(found, hidden @ written[UP].dequantize().T, atol=1e-5, rtol=1e-4)


def test_a_gptqmodel_directory(tmp_path):
    scheme = Scheme(4, 32, True, "group")
    written = write_quantized(tmp_path, FORMATS["gptq"], lambda _: scheme)
    edit_section(tmp_path, format="gptq", meta={"quantizer": ["gptqmodel:7.7.0"]}, uri="x")
    expect_readable(tmp_path, written, scheme)


def test_an_auto_gptq_directory_with_its_own_file_names(tmp_path):
    written = write_quantized(tmp_path, FORMATS["gptq"], lambda _: ASYMMETRIC)
    rewrite_config(tmp_path, quantization_config=None)
    own = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.01}
    (tmp_path / "quantize_config.json").write_text(json.dumps(own))
    name = "gptq_model-4bit-32g.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    expect_readable(tmp_path, written, ASYMMETRIC)
    convert(tmp_path, "awq", tmp_path.parent / "awq-of-auto-gptq")
    found = DequantizedSource(open_checkpoint(tmp_path.parent / "awq-of-auto-gptq"))
    assert found.read_quantized(UP).digest() == written[UP].digest()
    assert not (tmp_path.parent / "awq-of-auto-gptq" / "quantize_config.json").exists()


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_a_config_with_other_bits_than_the_codes_shows_when_it_is_inspected(name, tmp_path):
    write_quantized(tmp_path, FORMATS[name], lambda _: ASYMMETRIC)
    assert inspect_path(tmp_path).unread is None
    config = tmp_path / "config.json"
    config.write_text(re.sub(r'"(bits|num_bits)": 4', r'"\1": 8', config.read_text()))
    seen = inspect_path(tmp_path)
    assert seen.schemes == {} and seen.unread is not None
    assert "8" in seen.unread or "shape" in seen.unread


def test_a_foreign_directory_is_compared_with_its_source(tmp_path):
    written = write_quantized(tmp_path / "gptq", FORMATS["gptq"], lambda _: ASYMMETRIC)
    write_quantized(tmp_path / "dense", FORMATS["gptq"], lambda _: ASYMMETRIC)
    config = llama_config(vocab_size=512, **WIDTHS)
    write_checkpoint(tmp_path / "dense", config, dtype=torch.float16)
    found = compare(open_checkpoint(tmp_path / "gptq"), open_checkpoint(tmp_path / "dense"))
    assert found.bits == 4 and found.schemes[f"{UP}.weight"] == ASYMMETRIC
    weight = found.candidate.read(f"{UP}.weight")
    assert torch.equal(weight, written[UP].dequantize())


def test_an_old_autoawq_directory(tmp_path):
    written = write_quantized(tmp_path, FORMATS["awq"], lambda _: ASYMMETRIC)
    rewrite_config(tmp_path, quantization_config=None)
    own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(own))
    expect_readable(tmp_path, written, ASYMMETRIC)


def test_a_compressed_tensors_directory_that_says_little(tmp_path):
    written = write_quantized(
        tmp_path, FORMATS["compressed-tensors"], lambda _: Scheme(4, 32), dtype=torch.bfloat16
    )
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}
        },
    }
    rewrite_config(tmp_path, quantization_config=section)
    expect_readable(tmp_path, written, Scheme(4, 32))
    rewrite_config(tmp_path, quantization_config=None, compression_config=section)
    expect_readable(tmp_path, written, Scheme(4, 32))


def test_scales_of_float32_stay_what_they_are(tmp_path):
    def widen(tensor):
        return dataclasses.replace(tensor, scales=tensor.scales.float() * 1.0001)

    written = write_quantized(tmp_path, FORMATS["gptq"], lambda _: ASYMMETRIC, change=widen)
    expect_readable(tmp_path, written, ASYMMETRIC)
    convert(tmp_path, "awq", tmp_path.parent / "awq-of-float32")
    scales = load_file(tmp_path.parent / "awq-of-float32/model.safetensors")[f"{UP}.scales"]
    assert scales.dtype is torch.float32 and torch.equal(scales.t(), written[UP].scales)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_missing_part_is_named(part, tmp_path):
    write_quantized(tmp_path, FORMATS["gptq"], lambda _: ASYMMETRIC)
    rewrite_tensors(tmp_path, lambda tensors: tensors.pop(f"{UP}.{part}"))
    with pytest.raises(BadInputError, match=f"{UP}.{part} is missing|not the codes"):
        DequantizedSource(open_checkpoint(tmp_path)).read_quantized(UP)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_groups_that_do_not_divide_a_layer_name_it_and_the_config(name, tmp_path):
    written = write_quantized(tmp_path, FORMATS[name], lambda _: ASYMMETRIC)
    if name == "compressed-tensors":
        section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        section["config_groups"]["group_0"]["weights"]["group_size"] = 48
        rewrite_config(tmp_path, quantization_config=section)
    else:
        edit_section(tmp_path, group_size=48)
    assert written[UP].shape[1] == 64
    with pytest.raises(BadInputError, match=f"{UP}: group size 48 does not divide 64") as caught:
        DequantizedSource(open_checkpoint(tmp_path)).read_quantized(UP)
    assert "quantization_config" in caught.value.remedy


def test_a_layer_without_inputs_is_refused():
    with pytest.raises(BadInputError, match="m has 0 input features"):
        count_groups("m", Scheme(4, None), 0)


def test_a_weight_that_is_there_twice_is_refused(tmp_path):
    written = write_quantized(tmp_path, FORMATS["gptq"], lambda _: ASYMMETRIC)
    dense = written[UP].dequantize().half()
    rewrite_tensors(tmp_path, lambda tensors: tensors.update({f"{UP}.weight": dense}))
    with pytest.raises(BadInputError, match=f"{UP}.weight twice"):
        DequantizedSource(open_checkpoint(tmp_path))


def test_a_symmetric_claim_that_the_zero_points_deny_is_refused(tmp_path):
    write_quantized(tmp_path, FORMATS["gptq"], lambda _: ASYMMETRIC)
    edit_section(tmp_path, sym=True)
    with pytest.raises(BadInputError, match="readers disagree"):
        load(tmp_path)
    with pytest.raises(BadInputError, match="readers disagree"):
        convert(tmp_path, "awq", tmp_path / "../out")


def test_a_section_that_is_no_mapping_is_refused(tmp_path):
    write_quantized(tmp_path, FORMATS["gptq"], lambda _: ASYMMETRIC)
    rewrite_config(tmp_path, quantization_config=["gptq"])
    with pytest.raises(BadInputError, match="quantization_config is no mapping"):
        quantization_config(open_checkpoint(tmp_path))


PLAIN = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}


def test_what_changes_nothing_may_stand_in_a_section():
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {**PLAIN, "input_activations": None, "output_activations": None}},
        "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense", "global_sparsity": 0.1},
        "transform_config": {},
    }
    form = FORMATS["compressed-tensors"]
    assert form.schemes(section).scheme_of("m") == Scheme(4, 32)
    assert form.schemes({**section, "sparsity_config": {}}).scheme_of("m") == Scheme(4, 32)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"config_groups": {}}, "no config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16 is not spelled out"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "g has no weights section"),
        ({"config_groups": {"g": {"weights": {"num_bits": 4}}}}, "g has no targets"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
            "tensor None",
        ),
        ({"transform_config": {"config_groups": {}, "x": 1}}, "transforms activations"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "cache .*kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse .*sparsity_config"),
        ({"sparsity_config": "2:4"}, "sparse .*sparsity_config"),
        ({"config_groups": {"g": {**PLAIN, "input_activations": {"num_bits": 8}}}}, "input act"),
        (
            {"config_groups": {"g": {**PLAIN, "output_activations": {"num_bits": 8}}}},
            "output activations",
        ),
    ],
)
def test_compressed_tensors_sections_that_cannot_be_read(section, message):
    form = FORMATS["compressed-tensors"]
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", **section}
    config = {"config_groups": {"g": PLAIN}, **config}
    with pytest.raises(BadInputError, match=message):
        form.schemes(config)
