"""Configs whose values are of other types than their makers write: refused, never guessed at."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import BadInputError
from llmopt.formats import FORMATS, read_format
from llmopt.quantization.scheme import INT_BITS

CONFIGS = {
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "is_marlin_format": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {"+:.*up_proj": {"bits": 8, "sym": False}, "-:lm_head": {}},
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear", "re:.*up_proj"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "actorder": None,
                },
                "input_activations": None,
            }
        },
        "ignore": ["lm_head"],
    },
}
Path = tuple[str, ...]


def places(value, at: Path = ()):
    """Where the values of a config stand, those within its mappings too."""
    for key, inner in value.items():
        yield (*at, key)
        if isinstance(inner, dict):
            yield from places(inner, (*at, key))


def changed(config, place: Path, value):
    """A copy with another value at ``place``."""
    copy = json.loads(json.dumps(config))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


PLACES = [(name, place) for name, config in CONFIGS.items() for place in places(config)]
ODD = st.sampled_from(
    ["re:(", "re:a{9999999999999999999}", "re:[[a]", "false", "4", 4.0, 32.0, 1e400, -1, 0, "gptq"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | ODD,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | ODD.map(str), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(where=st.sampled_from(PLACES), value=VALUES)
@settings(max_examples=1000, deadline=None)
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_any_value_anywhere_is_a_scheme_or_bad_input(where, value):
    name, place = where
    config = changed(CONFIGS[name], place, value)
    try:
        scheme = read_format(config).schemes(config).scheme_of("model.layers.0.mlp.up_proj")
    except BadInputError as error:
        assert error.remedy
        return
    if scheme is not None:
        assert type(scheme.bits) is int and scheme.bits in INT_BITS
        assert scheme.group_size is None or type(scheme.group_size) is int
        assert type(scheme.symmetric) is bool


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_are_read_as_they_stand(name):
    form = read_format(CONFIGS[name])
    assert form == FORMATS[name]
    assert form.schemes(CONFIGS[name]).scheme_of("model.layers.0.mlp.down_proj").bits == 4
    assert form.schemes(CONFIGS[name]).scheme_of("lm_head") is None


WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("awq", ("quant_method",), ["awq"], r"\['awq'\] is not one"),
        ("awq", ("modules_to_not_convert",), "lm_head", '"lm_head", expected a list of names'),
        ("awq", ("modules_to_not_convert",), 3, "3, expected a list"),
        ("awq", ("modules_to_not_convert",), [1], r"\[1\], expected a list"),
        ("awq", ("bits",), 4.0, "bits is 4.0, expected a whole number"),
        ("awq", ("zero_point",), "false", 'zero_point is "false", expected true or false'),
        ("gptq", ("sym",), "false", 'sym is "false"'),
        ("gptq", ("sym",), None, "sym is null"),
        ("gptq", ("desc_act",), "false", "desc_act"),
        ("gptq", ("is_marlin_format",), "false", "is_marlin_format"),
        ("gptq", ("bits",), True, "bits is true"),
        ("gptq", ("dynamic", "+:.*up_proj", "bits"), 8.0, r"'\+:\.\*up_proj': bits is 8.0"),
        ("gptq", ("dynamic", "+:("), {"bits": 8}, "no regular expression"),
        ("compressed-tensors", ("ignore",), ["re:("], r"'\(' is no regular expression"),
        ("compressed-tensors", ("ignore",), "lm_head", "expected a list"),
        ("compressed-tensors", (*WEIGHTS, "num_bits"), 4.0, "num_bits is 4.0"),
        ("compressed-tensors", (*WEIGHTS, "symmetric"), "false", "symmetric"),
        ("compressed-tensors", (*WEIGHTS, "group_size"), 32.0, "group_size is 32.0"),
        ("compressed-tensors", (*WEIGHTS[:2], "targets"), ["re:*"], "no regular expression"),
        ("compressed-tensors", (*WEIGHTS[:2], "targets"), None, "group_0 has no targets"),
    ],
)
def test_a_value_of_another_type_is_named(name, place, value, message):
    config = changed(CONFIGS[name], place, value)
    with pytest.raises(BadInputError, match=message):
        read_format(config).schemes(config)
