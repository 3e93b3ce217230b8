"""What the report says of the calibration text's reach."""

import pytest

from llmopt.report.schema import DeclinedFold, LayerRecord, ScaleRecord, SchemeRecord
from llmopt.reporting import BlockRecords, _coverage


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
            block=index,
            shape=(8, 32),
            scheme=scheme,
            solver="rtn",
            weight_error=0.1,
            num_tokens=number,
        )
        for index, number in enumerate(tokens)
    ]
    assert _coverage(BlockRecords(tuple(layers)), set()).min_tokens_per_layer == least
    # An embedding that is rounded sees no text, whoever else does.
    table = layers[0].model_copy(update={"block": None, "num_tokens": 0}) if layers else None
    with_table = [*layers, table] if table else layers
    assert _coverage(BlockRecords(tuple(with_table)), set()).min_tokens_per_layer == least


def test_folds_are_counted_and_what_could_not_be_folded_is_told_once() -> None:
    scale = ScaleRecord(
        block=0,
        producer="norm",
        readers=("up",),
        alpha=0.5,
        duo=False,
        error_ratio=0.7,
        smallest=0.5,
        largest=2.0,
    )
    left_alone = scale.model_copy(update={"alpha": 0.0, "error_ratio": 1.0})
    declined = tuple(
        DeclinedFold(block=block, producer="gate", reason=reason)
        for block, reason in enumerate(["not linear", "not linear", "no reader"])
    )
    coverage = _coverage(BlockRecords((), (scale, left_alone), declined), set())
    assert coverage.num_folds == 1
    assert coverage.declined_folds == {"gate": "not linear; no reader"}
