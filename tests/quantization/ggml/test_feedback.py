from functools import cache

import pytest
import torch

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.ggml.feedback import FeedbackOptions, gptq_blocks
from llmopt.quantization.ggml.packing import pack_blocks, unpack_blocks
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.refit import refit_scales
from llmopt.quantization.ggml.types import GGML_TYPES

BLOCK_TYPES = [kind for kind in GGML_TYPES.values() if not kind.is_plain]
PLAIN = FeedbackOptions(by_energy=False, refit=False)


def named(kind):
    return kind.name


def problem(rows=16):
    weight, hessian = drawn()
    return weight[:rows].clone(), hessian.clone()


@cache
def drawn(rows=16, columns=512):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(3 * columns, columns, generator=generator)
    inputs = inputs @ (mixing + 0.3 * torch.eye(columns))
    inputs *= torch.exp(torch.randn(columns, generator=generator) * 0.7)
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs.T @ inputs


def row_errors(weight, hessian, tensor):
    rest = (weight - tensor.dequantize()).double()
    return torch.einsum("ri,ij,rj->r", rest, hessian.double(), rest)


def conditional_rounding(weight, hessian, grid, damping):
    """GPTQ as its paper has it, with the inverse, in float64 and left to right."""
    kind, columns = grid.type, weight.shape[1]
    hessian = hessian.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rest = weight.double().clone()
    steps = grid.step_sizes().double().repeat_interleave(kind.sub_block, dim=1)
    shifts = torch.zeros_like(steps)
    if kind.min_sign:
        shifts = grid.shifts().double().repeat_interleave(kind.sub_block, dim=1)
    levels = kind.levels().double()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for column in range(columns):
        points = shifts[:, column, None] + steps[:, column, None] * levels
        code = (rest[:, column, None] - points).abs().argmin(dim=1)
        codes[:, column] = code
        error = rest[:, column] - points.gather(1, code[:, None]).squeeze(1)
        rest[:, column:] -= (error / factor[column, column])[:, None] * factor[column, column:]
    return codes


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
def test_output_error_falls_well_below_that_of_the_nearest_codes(kind):
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    in_order, by_energy, refit = (
        gptq_blocks(weight, hessian, kind, options)
        for options in (PLAIN, FeedbackOptions(refit=False), FeedbackOptions())
    )
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert in_order.error < 0.8 * in_order.rtn_error
    assert by_energy.error < 0.7 * by_energy.rtn_error
    assert by_energy.error < in_order.error
    assert refit.error <= by_energy.error
    measured = row_errors(weight, hessian, refit.tensor).sum()
    measured /= torch.einsum("ri,ij,rj->", weight.double(), hessian.double(), weight.double())
    assert refit.error == pytest.approx(float(measured), rel=1e-2)
    data = pack_blocks(refit.tensor)
    assert torch.equal(unpack_blocks(data, kind, 512).dequantize(), refit.tensor.dequantize())


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
def test_codes_are_those_of_the_form_with_the_inverse(kind):
    weight, hessian = problem(rows=6)
    grid = quantize_blocks(weight, kind, importance=hessian.diagonal())
    found = gptq_blocks(weight, hessian, kind, PLAIN).tensor
    for part in ("scales", "sub_scales", "mins", "sub_mins"):
        ours, given = getattr(found, part), getattr(grid, part)
        assert ours is given is None or torch.equal(ours, given)
    expected = conditional_rounding(weight, hessian, grid, PLAIN.damping)
    # A value between two codes may fall to either side, and leads its row apart from there on.
    rows = (found.codes == expected).float().mean(dim=1)
    assert float(rows.median()) > 0.99, rows


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
def test_without_correlation_nothing_feeds_back(kind):
    weight, hessian = problem(rows=4)
    diagonal = torch.diag(hessian.diagonal())
    found = gptq_blocks(weight, diagonal, kind, FeedbackOptions(refit=False))
    nearest = quantize_blocks(weight, kind, importance=hessian.diagonal())
    close = (found.tensor.dequantize() - nearest.dequantize()).abs() < 1e-6
    assert float(close.float().mean()) > 0.999
    assert found.error == pytest.approx(found.rtn_error, rel=1e-4)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
def test_refitting_makes_no_row_worse_and_keeps_codes(kind):
    weight, hessian = problem()
    before = gptq_blocks(weight, hessian, kind, PLAIN).tensor
    after = refit_scales(before, weight, hessian)
    assert torch.equal(after.codes, before.codes)
    assert after.scales.dtype is torch.float16 and after.scales.shape == before.scales.shape
    old, new = row_errors(weight, hessian, before), row_errors(weight, hessian, after)
    assert bool((new <= old * (1 + 1e-5)).all())
    assert float(new.sum()) < 0.999 * float(old.sum())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q2_K", "Q6_K", "IQ4_XS"])
def test_refitting_finds_the_least_squares_solution(name):
    weight, hessian = problem(rows=2)
    kind = GGML_TYPES[name]
    # Rough scales, so that float16 is fine beside what is to be gained.
    tensor = quantize_blocks(weight * 1.2, kind, search="compatible")
    found = refit_scales(tensor, weight, hessian)
    root = torch.linalg.cholesky(hessian.double()).T
    unknowns = [(tensor.scales, "scales")] + ([(tensor.mins, "mins")] if kind.min_sign else [])
    for row in range(2):
        columns = []
        for part, part_name in unknowns:
            for block in range(part.shape[1]):
                values = {"scales": torch.zeros_like(tensor.scales), part_name: part * 0}
                if kind.min_sign and part_name == "scales":
                    values["mins"] = torch.zeros_like(part)
                values[part_name][row, block] = 1.0
                parts = {n: getattr(tensor, n) for n in ("sub_scales", "mins", "sub_mins")}
                unit = type(tensor)(kind, tensor.codes, **{**parts, **values})
                columns.append(unit.dequantize()[row].double())
        design = torch.stack(columns, dim=1)
        best = torch.linalg.lstsq(root @ design, (root @ weight[row].double())[:, None])
        least = (root @ (design @ best.solution - weight[row].double()[:, None])).square().sum()
        reached = row_errors(weight, hessian, found)[row]
        start = row_errors(weight, hessian, tensor)[row]
        assert float(reached - least) < 0.02 * float(start - least)


def test_dead_columns_are_rounded_and_counted():
    weight, hessian = problem(rows=3)
    hessian[7], hessian[:, 7] = 0, 0
    found = gptq_blocks(weight, hessian, GGML_TYPES["Q8_0"])
    assert found.num_dead_columns == 1
    assert float((found.tensor.dequantize() - weight)[:, 7].abs().max()) < 1e-3


def test_an_importance_of_ones_own_finds_other_scales():
    weight, hessian = problem(rows=3)
    kind = GGML_TYPES["Q4_K"]
    given = gptq_blocks(weight, hessian, kind, PLAIN, torch.ones(512)).tensor
    assert torch.equal(given.sub_scales, quantize_blocks(weight, kind).sub_scales)
    assert not torch.equal(
        given.sub_scales, gptq_blocks(weight, hessian, kind, PLAIN).tensor.sub_scales
    )


def test_what_does_not_fit_is_refused():
    weight, hessian = problem(rows=2)
    kind = GGML_TYPES["Q4_K"]
    with pytest.raises(BadInputError, match="a Hessian of shape"):
        gptq_blocks(weight, hessian[:256, :256], kind)
    with pytest.raises(BadInputError, match="damping"):
        gptq_blocks(weight, hessian, kind, FeedbackOptions(damping=2.0))
    with pytest.raises(BadInputError, match="do not make up rows"):
        gptq_blocks(weight[:, :128], hessian[:128, :128], kind)
    hessian[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="Hessian"):
        gptq_blocks(weight, hessian, kind)
