from __future__ import annotations

import pytest
import torch

from llmopt.calibration.statistics import ColumnStatistics, InputStatistics
from llmopt.checkpoint.shell import TokenBatch
from llmopt.errors import NumericalError


def batch_of(rows: int, tokens: int, names: tuple[str, ...] = ()) -> TokenBatch:
    return TokenBatch(torch.zeros(rows, tokens, dtype=torch.int64), names=names)


def test_hessian_is_twice_the_mean_outer_product_over_all_batches() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 7, 5), torch.randn(1, 3, 5), torch.randn(3, 1, 5)]
    statistics = InputStatistics("layer", 5)
    for index, part in enumerate(parts):
        statistics.update(part, batch_of(*part.shape[:2]), index)
    rows = torch.cat([part.reshape(-1, 5) for part in parts]).double()
    expected = 2 / len(rows) * rows.T @ rows
    torch.testing.assert_close(statistics.hessian.double(), expected, atol=1e-6, rtol=1e-6)
    assert statistics.num_tokens == 20
    assert statistics.max_abs == float(rows.abs().max())


def test_every_block_of_a_wide_hessian_is_there_between_batches_too() -> None:
    torch.manual_seed(1)
    parts = [torch.randn(1, 40, 2 * 256 + 3) for _ in range(3)]
    statistics = InputStatistics("layer", parts[0].shape[-1])
    seen = []
    for index, part in enumerate(parts):
        statistics.update(part, batch_of(1, 40), index)
        seen.append(part[0].double())
        rows = torch.cat(seen)
        expected = 2 / len(rows) * rows.T @ rows
        torch.testing.assert_close(statistics.hessian.double(), expected, atol=1e-5, rtol=1e-5)


def test_sixteen_bit_inputs_are_accumulated_in_float32() -> None:
    inputs = torch.full((1, 3, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    statistics = InputStatistics("layer", 1)
    statistics.update(inputs, batch_of(1, 3), 0)
    assert statistics.hessian.dtype == torch.float32
    assert float(statistics.hessian) == pytest.approx(2 * (1 + 2**-7) ** 2, rel=1e-6)


def test_a_batch_of_no_rows_changes_nothing() -> None:
    statistics = InputStatistics("expert", 3)
    statistics.update(torch.full((1, 4, 3), -2.0), batch_of(1, 4), 0)
    before = statistics.hessian.clone()
    statistics.update(torch.empty(0, 3), batch_of(1, 4), 1)
    assert torch.equal(statistics.hessian, before)
    assert (statistics.max_abs, statistics.num_tokens) == (2.0, 4)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (-float("inf"), "infinity")])
def test_bad_activation_names_layer_sample_and_token(value: float, kind: str) -> None:
    inputs = torch.zeros(2, 3, 4)
    inputs[1, 2, 0] = value
    statistics = InputStatistics("model.layers.4.mlp.down_proj", 4)
    statistics.update(torch.ones(2, 3, 4), batch_of(2, 3), 0)
    with pytest.raises(NumericalError) as caught:
        statistics.update(inputs, batch_of(2, 3, ("a.txt", "b.txt")), 6)
    for part in (kind, "model.layers.4.mlp.down_proj", "token 2", "b.txt", "batch 6", "row 1"):
        assert part in str(caught.value)
    assert statistics.num_tokens == 6  # the bad batch was not counted


def test_bad_activation_without_names_gives_the_row() -> None:
    with pytest.raises(NumericalError, match=r"row 0 \(batch 3"):
        InputStatistics("layer", 1).update(torch.full((1, 1, 1), torch.nan), batch_of(1, 1), 3)


def test_hessian_overflow_is_an_error() -> None:
    statistics = InputStatistics("layer", 2)
    with pytest.raises(NumericalError, match="Hessian of layer overflows"):
        statistics.update(torch.full((1, 2, 2), 1e25), batch_of(1, 2), 0)


def test_column_statistics_are_the_diagonal_of_the_second_moments() -> None:
    generator = torch.Generator().manual_seed(3)
    columns, whole = ColumnStatistics("layer", 7), InputStatistics("layer", 7)
    rows = []
    for index in range(3):
        batch = TokenBatch(torch.zeros(2, 5 + index, dtype=torch.int64))
        inputs = torch.randn(2, 5 + index, 7, generator=generator) * torch.arange(7)
        rows.append(inputs.reshape(-1, 7))
        for statistics in (columns, whole):
            statistics.update(inputs, batch, index)
    expected = torch.cat(rows).square().mean(dim=0)
    torch.testing.assert_close(columns.energy, expected)
    torch.testing.assert_close(whole.energy, expected)
    assert columns.num_tokens == whole.num_tokens == 36 and columns.max_abs == whole.max_abs
    assert columns.zero_columns.tolist() == [True] + [False] * 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_column_statistics_refuse_what_no_float_can_sum(value: float) -> None:
    inputs = torch.ones(1, 4, 3)
    inputs[0, 2, 1] = value
    with pytest.raises(NumericalError, match="layer"):
        ColumnStatistics("layer", 3).update(inputs, TokenBatch(torch.zeros(1, 4).long()), 0)
