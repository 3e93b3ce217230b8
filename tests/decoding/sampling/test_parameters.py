from __future__ import annotations

import math
from typing import Any

import pytest

from llmopt.decoding.sampling.parameters import SamplingParameters, parse_options
from llmopt.errors import BadInputError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", 1e-9),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", ("a", 3)),
        ("ignore_eos", 1),
        ("logprobs", -1),
        ("n", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(BadInputError, match=name):
        SamplingParameters(**{name: value})


def test_the_ends_of_the_ranges_are_inside() -> None:
    parameters = SamplingParameters(
        max_new_tokens=1, temperature=1e-6, top_k=1, top_p=1, min_p=1, seed=2**64 - 1, logprobs=0
    )
    assert parameters.restricted and not parameters.greedy
    assert SamplingParameters().greedy and not SamplingParameters(temperature=1.0).restricted


def test_an_unknown_option_is_refused_with_the_closest_name() -> None:
    with pytest.raises(BadInputError) as caught:
        parse_options({"max_tokens": 5, "temperature": 1.0})
    assert "'max_tokens'" in caught.value.what and "max_new_tokens" in caught.value.remedy
    with pytest.raises(BadInputError) as caught:
        parse_options({"zzz": 5})
    assert "repetition_penalty" in caught.value.remedy


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_a_filter_without_a_temperature_is_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="temperature"):
        parse_options({name: 1})
    assert parse_options({name: 1, "temperature": 0.0}).greedy


@pytest.mark.parametrize("stop", ["END", ["END"], ("END",)])
def test_stop_is_one_text_or_several(stop: Any) -> None:
    assert parse_options({"stop": stop}).stop == ("END",)


def test_none_is_not_given() -> None:
    nothing = {"stop": None, "temperature": None, "top_p": None, "seed": None, "n": None}
    assert parse_options(nothing) == SamplingParameters()
