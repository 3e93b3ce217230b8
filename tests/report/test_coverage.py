"""What the report says of the calibration text's reach."""

import pytest

from llmopt.report.schema import LayerRecord, SchemeRecord
from llmopt.reporting import _coverage


@pytest.mark.parametrize(
    ("tokens", "least"), [((0, 0), None), ((0, 9), 0), ((7, 9), 7), ((), None)]
)
def test_tokens_of_a_solver_without_text_are_unknown(
    tokens: tuple[int, ...], least: int | None
) -> None:
    scheme = SchemeRecord(name="W4A16", bits=4, group_size=32, symmetric=True)
    layers = [
        LayerRecord(
            name=f"layer{index}",
            block=None,
            shape=(8, 32),
            scheme=scheme,
            solver="rtn",
            weight_error=0.1,
            num_tokens=number,
        )
        for index, number in enumerate(tokens)
    ]
    assert _coverage(layers).min_tokens_per_layer == least
