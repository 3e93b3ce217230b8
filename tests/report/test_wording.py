import math

import pytest

from llmopt.report import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.000"),
        (12.3456, "12.35"),
        (9.99996, "10.00"),
        (-0.0123456, "-0.01235"),
        (1234567.0, "1,235,000"),
        (0.0000321, "3.210e-05"),
        (3.21e9, "3.210e+09"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (math.nan, "not a number"),
        (None, "–"),
    ],
)
def test_number_keeps_four_significant_digits(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (8_321_499, "7.936 MiB"),
        (3 * 2**40, "3 TiB"),
        (1024**2 - 1, "1 MiB"),
    ],
)
def test_size_uses_the_largest_unit(num_bytes, text):
    assert wording.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4213, "0.421 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (247, "4 min 07 s"),
        (3599.7, "1 h 00 min"),
        (7501, "2 h 05 min"),
    ],
)
def test_duration(seconds, text):
    assert wording.duration(seconds) == text


def test_shortened_keeps_both_ends_and_the_length():
    name = "model.layers.11.self_attn.q_proj"
    assert wording.shortened(name, 15) == "model.l….q_proj"
    assert len(wording.shortened(name, 14)) == 14
    assert wording.shortened(name, len(name)) == name


def test_plural_and_limit():
    assert wording.plural(1, "layer") == "1 layer"
    assert wording.plural(1200, "layer") == "1,200 layers"
    assert (wording.limit(1.05), wording.limit(-0.03)) == ("1.05", "-0.03")
