from __future__ import annotations

import pytest

from llmopt.errors import BadInputError
from llmopt.formats import choose_format
from llmopt.quantization.scheme import Scheme

FORMATS = ["compressed-tensors", "gptq", "awq"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_config_of_no_layer_is_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="no linear layer would be quantized"):
        choose_format(name, None).config({}, ["lm_head"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_that_is_quantized_and_ignored_is_refused(name: str) -> None:
    scheme = Scheme(symmetric=False)
    with pytest.raises(BadInputError, match=r"a\.b"):
        choose_format(name, None).config({"a.b": scheme, "a.c": scheme}, ["a.b"])
