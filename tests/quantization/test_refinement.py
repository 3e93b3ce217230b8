import pytest
import torch

from llmopt.quantization.gptq import GPTQOptions, gptq
from llmopt.quantization.refinement import refine_scales
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme


def problem(rows=17, columns=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def errors(weight, hessian, tensor):
    rest = (weight - tensor.dequantize()).double()
    return torch.einsum("ri,ij,rj->r", rest, hessian.double(), rest)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("order", ["none", "group"])
def test_no_row_gets_worse_and_the_whole_gets_better(symmetric, dtype, order):
    weight, hessian = problem()
    scheme = Scheme(3, 32, symmetric, order)
    before = gptq(weight, hessian, scheme, GPTQOptions(), dtype).tensor
    after = refine_scales(before, weight, hessian)
    assert torch.equal(after.codes, before.codes) and after.scales.dtype is dtype
    old, new = errors(weight, hessian, before), errors(weight, hessian, after)
    assert bool((new <= old * (1 + 1e-5)).all())
    assert float(new.sum()) < 0.98 * float(old.sum())


def test_in_full_precision_it_is_the_least_squares_solution():
    weight, hessian = problem(rows=3)
    tensor = rtn(weight, Scheme(2, 32, False), scale_dtype=torch.float32)
    found = refine_scales(tensor, weight, hessian)
    root = torch.linalg.cholesky(hessian.double()).T  # |root (w - q)| is the error's root
    for row in range(3):
        centred = (
            tensor.codes[row].double() - tensor.zero_points[row].double()[tensor.column_groups()]
        )
        design = torch.zeros(96, 3, dtype=torch.float64)
        design[torch.arange(96), tensor.column_groups()] = centred
        best = torch.linalg.lstsq(root @ design, (root @ weight[row].double()).unsqueeze(1))
        torch.testing.assert_close(
            found.scales[row].double(), best.solution.squeeze(1), rtol=1e-3, atol=1e-5
        )


def test_rounding_one_scale_after_the_other_beats_rounding_all_at_once():
    weight, hessian = problem(rows=40, seed=2)
    tensor = rtn(weight, Scheme(4, 8, False), scale_dtype=torch.bfloat16)
    exact = refine_scales(
        rtn(weight, Scheme(4, 8, False), scale_dtype=torch.float32), weight, hessian
    )
    at_once = type(tensor)(
        exact.codes, exact.scales.bfloat16(), exact.zero_points, None, exact.scheme
    )
    codes_alike = type(tensor)(exact.codes, tensor.scales, exact.zero_points, None, exact.scheme)
    one_by_one = refine_scales(codes_alike, weight, hessian)
    assert errors(weight, hessian, one_by_one).sum() < errors(weight, hessian, at_once).sum()


def test_groups_of_zeros_and_dead_inputs_keep_their_scales():
    weight, hessian = problem(rows=2, columns=64)
    weight[:, :32] = 0
    tensor = rtn(weight, Scheme(4, 32), scale_dtype=torch.float32)
    found = refine_scales(tensor, weight, hessian)
    assert torch.equal(found.scales[:, 0], tensor.scales[:, 0])
    dead = refine_scales(tensor, weight, torch.zeros(64, 64))
    assert torch.equal(dead.scales, tensor.scales)
