import re

import pytest

from llmopt.errors import BadInputError
from llmopt.formats import read_format
from llmopt.formats.gptq import GPTQ
from llmopt.quantization.scheme import Scheme

FORM = GPTQ()
W4 = Scheme(4, 128)

GPTQMODEL = {
    "bits": 4,
    "dynamic": {
        r"+:.*\.1\..*down_proj": {"bits": 8, "group_size": 64},
        r".*\.2\..*": {"sym": False, "desc_act": True},
        r"-:.*\.3\..*": {},
    },
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "quant_method": "gptq",
    "format": "gptq",
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "mse": 0.0},
}
AUTO_GPTQ = {
    "bits": 4,
    "group_size": -1,
    "damp_percent": 0.01,
    "desc_act": True,
    "static_groups": False,
    "sym": False,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "gptq_model-4bit--1g",
}


def test_a_single_scheme_needs_no_rules():
    config = FORM.config({"a.q_proj": W4, "a.k_proj": W4}, ["lm_head", r"re:.*\.lm_head$"])
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    assert FORM.companion_files(config) == {
        "quantize_config.json": {**config, "model_file_base_name": "model"}
    }


def test_mixed_schemes_and_kept_layers_come_back():
    schemes = {
        "m.0.q_proj": W4,
        "m.0.k_proj": W4,
        "m.0.v_proj": Scheme(4, 128, True, "weight"),  # the file does not say how it was solved
        "m.0.gate_proj": Scheme(8, None, False),
        "m.0.down_proj": Scheme(3, 64),
        "m.1.up_proj": Scheme(4, 128, False, "group"),
    }
    config = FORM.config(schemes, ["lm_head", "m.1.down_proj", r"re:.*vision\..*"])
    assert config["modules_in_block_to_quantize"] == [list(schemes)]
    table = FORM.schemes(config)
    found = {name: table.scheme_of(name) for name in schemes}
    assert found == schemes | {"m.0.v_proj": W4}
    assert table.scheme_of("m.1.down_proj") is None
    assert table.scheme_of("a.vision.q_proj") is None
    assert table.scheme_of("m.11.down_proj") == W4
    # vLLM asks for the fused layer, and finds the same rule.
    assert table.scheme_of("m.0.gate_up_proj") == Scheme(8, None, False)
    assert table.scheme_of("m.0.qkv_proj") == W4


def taken_by_optimum(config, module):
    """As optimum decides which layers of the text model's blocks it replaces by packed ones."""
    return any(module.endswith(name) for name in sum(config["modules_in_block_to_quantize"], []))


@pytest.mark.parametrize(
    ("written", "looked_up"),
    [
        (r"re:.*text_model.*\.layers\.{}$", "model.text_model.layers.{}"),
        (r"re:(?:model\.)?layers\.{}$", "model.layers.{}"),
        (r"re:(?:model\.)?layers\.{}$", "layers.{}"),
        ("model.layers.{}", "model.layers.{}"),
    ],
    ids=["wrapper", "bare body", "bare body, its own names", "plain"],
)
def test_each_consumer_finds_the_kept_layers_and_the_rules(written, looked_up):
    def name(layer):
        return written.format(layer.replace(".", r"\.") if written.startswith("re:") else layer)

    schemes = {
        name("1.self_attn.o_proj"): W4,
        name("1.mlp.down_proj"): W4,
        name("1.mlp.gate_proj"): Scheme(8, 32),
        name("1.mlp.up_proj"): Scheme(8, 32),
    }
    kept = [name(f"1.self_attn.{part}_proj") for part in "qkv"] + [name("11.mlp.down_proj")]
    config = FORM.config(schemes, ["lm_head", *kept])
    table = FORM.schemes(config)
    meant = {
        "1.self_attn.o_proj": W4,
        "1.mlp.down_proj": W4,
        "1.mlp.gate_proj": Scheme(8, 32),
        "1.mlp.gate_up_proj": Scheme(8, 32),
        "1.self_attn.q_proj": None,
        "1.self_attn.qkv_proj": None,
        "11.mlp.down_proj": None,
    }
    assert {layer: table.scheme_of(looked_up.format(layer)) for layer in meant} == meant
    for layer, scheme in meant.items():
        if layer != "1.mlp.gate_up_proj":  # transformers does not fuse
            assert taken_by_optimum(config, looked_up.format(layer)) == (scheme is not None), layer


def test_names_that_are_patterns_become_rules():
    schemes = {r"re:.*text.*\.0\.q$": W4, r"re:.*text.*\.1\.q$": Scheme(8, 32)}
    config = FORM.config(schemes, ["lm_head", r"re:.*text.*\.2\.q$"])
    assert config["modules_in_block_to_quantize"] == [[".0.q", ".1.q"]]
    table = FORM.schemes(config)
    assert table.scheme_of("text.model.1.q") == Scheme(8, 32)
    assert table.scheme_of("text.model.2.q") is None


def test_a_pattern_without_an_end_is_refused_where_layers_are_kept():
    with pytest.raises(BadInputError, match="does not say how the names"):
        FORM.config({"re:.*text.*": W4}, ["a"])


def test_gptqmodels_config_is_read():
    table = FORM.schemes(GPTQMODEL)
    assert table.scheme_of("model.layers.0.mlp.down_proj") == W4
    assert table.scheme_of("model.layers.1.mlp.down_proj") == Scheme(8, 64)
    assert table.scheme_of("model.layers.2.mlp.up_proj") == Scheme(4, 128, False, "group")
    assert table.scheme_of("model.layers.3.mlp.up_proj") is None


def test_auto_gptqs_config_is_read():
    """No quant_method, no checkpoint_format; one group a row has no order."""
    assert FORM.schemes(AUTO_GPTQ).scheme_of("m") == Scheme(4, None, False, "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "'awq' is not gptq"),
        ({"checkpoint_format": "gptq_v2"}, "contradicts itself"),
        ({"checkpoint_format": "marlin", "format": None}, "'marlin' is not one"),
        ({"format": "bitblas", "checkpoint_format": None}, "'bitblas' is not one"),
        ({"is_marlin_format": True}, "marlin"),
        ({"pack_dtype": "int64"}, "int64 words"),
        ({"bits": 5}, "5 bits"),
        ({"bits": "four"}, 'bits is "four"'),
        ({"group_size": 0}, "groups of 0"),
        ({"group_size": None}, "group_size is null"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "no regular expression"),
        ({"dynamic": {"+:a": False}}, "is empty"),
        ({"dynamic": {"+:a": {"bits": 6}}}, r"rule '\+:a': 6 bits"),
        ({"dynamic": ["a"]}, "not a mapping"),
    ],
)
def test_configs_that_llmopt_does_not_read_are_refused(change, message):
    config = {**GPTQMODEL, **change}
    with pytest.raises(BadInputError, match=message):
        read_format({**config, "quant_method": "gptq"})
        FORM.schemes(config)


def test_missing_keys_are_named():
    with pytest.raises(BadInputError, match="lacks bits and group_size"):
        FORM.schemes({"quant_method": "gptq"})


def test_a_variant_reads_its_own_configs_only():
    with pytest.raises(BadInputError, match=re.escape("says checkpoint_format gptq_v2, not gptq")):
        FORM.schemes(GPTQ("gptq_v2").config({"m": W4}, []))


def test_a_config_needs_layers_and_no_contradiction():
    with pytest.raises(BadInputError, match="no linear layer"):
        FORM.config({}, ["lm_head"])
    with pytest.raises(BadInputError, match="both quantized and ignored"):
        FORM.config({"lm_head": W4}, ["lm_head"])
