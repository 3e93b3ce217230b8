import gguf
import pytest

from llmopt.errors import BadInputError
from llmopt.quantization.ggml.types import GGML_TYPES, GGML_TYPES_BY_ID, fitting_type, ggml_type


@pytest.mark.parametrize("name", GGML_TYPES)
def test_numbers_are_those_of_the_gguf_package(name):
    kind, theirs = GGML_TYPES[name], gguf.GGMLQuantizationType[name]
    assert kind.id == theirs.value
    assert (kind.block_size, kind.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]
    assert GGML_TYPES_BY_ID[kind.id] is kind


def test_widths_and_labels():
    assert GGML_TYPES["Q4_K"].bits_per_weight == 4.5
    assert GGML_TYPES["Q6_K"].label == "Q6_K (6.5625 bits a weight)"
    assert GGML_TYPES["Q3_K"].row_bytes(512) == 220
    assert [kind.name for kind in GGML_TYPES.values() if kind.is_plain] == ["F32", "F16", "BF16"]


@pytest.mark.parametrize(
    ("wanted", "of_32", "of_less"),
    [
        ("Q2_K", "Q4_0", "F16"),
        ("Q3_K", "Q4_0", "F16"),
        ("Q4_K", "Q5_0", "F16"),
        ("Q5_K", "Q5_1", "F16"),
        ("Q6_K", "Q8_0", "F16"),
        ("IQ4_XS", "IQ4_NL", "F16"),
        ("IQ4_NL", "IQ4_NL", "F16"),
        ("Q8_0", "Q8_0", "F16"),
        ("Q4_1", "Q4_1", "F16"),
        ("BF16", "BF16", "BF16"),
        ("F32", "F32", "F32"),
    ],
)
def test_narrow_rows_fall_back_as_in_llama_cpp(wanted, of_32, of_less):
    kind = GGML_TYPES[wanted]
    assert fitting_type(kind, 512) is kind
    assert fitting_type(kind, 288).name == of_32
    assert fitting_type(kind, 100).name == of_less


def test_an_unknown_type_is_refused_with_the_closest_name():
    with pytest.raises(BadInputError, match="did you mean Q4_K"):
        ggml_type("q4_k")
    with pytest.raises(BadInputError, match="the types are F32, F16"):
        ggml_type("")
    assert ggml_type("Q4_K") is GGML_TYPES["Q4_K"]


def test_rows_that_are_not_whole_blocks_are_refused_with_what_fits():
    with pytest.raises(BadInputError, match="as Q5_0"):
        GGML_TYPES["Q4_K"].row_bytes(288)
