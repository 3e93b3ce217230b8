from __future__ import annotations

import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_jobs import small_recipe, write_job, write_text
from support.tiny_models import CONFIGS, build_model, rewrite_tensors, write_checkpoint
from support.walking import open_walker, random_batch
from torch import Tensor, nn

from llmopt.calibration import block_pass
from llmopt.calibration.block_pass import Group
from llmopt.calibration.folds import Declined, Fold, find_folds
from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.probing import Run
from llmopt.calibration.statistics import InputStatistics
from llmopt.calibration.walker import BlockWalker
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.errors import NumericalError
from llmopt.pipeline import quantize
from llmopt.quantization.awq import AWQOptions
from llmopt.quantization.scheme import Scheme
from llmopt.scaling import BlockScaling, LinearScales, scale_block

OPTIONS = AWQOptions(num_scales=4)


def scale(
    folder: Path,
    directory: Path,
    block: int = 1,
    kept: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    beside: float = 0.0,
) -> tuple[BlockWalker, BlockScaling, Tensor, Tensor]:
    """Scale a block of a checkpoint; also the block's output before and after, in float32.

    Where ``beside`` is not 0 the block adds so much of the sine of its normed input.
    """
    walker = open_walker(directory, dtype)
    structure = walker.structure
    prefix = structure.block_prefix(block)
    schemes = {
        f"{prefix}.{name}": Scheme(4, None, False)
        for name in structure.linear_names(block)
        if not name.endswith(kept)
    }
    batches = [random_batch(3, 40, seed=seed) for seed in range(2)]
    shapes = [batch.shape for batch in batches]
    states = HiddenStatePair.create(folder, shapes, structure.hidden_size, walker.dtype)
    walker.start(batches, states.inputs(0))
    with walker.materialise(block) as module:
        if beside:
            read_beside(module, beside)
        before = walker.forward(block, module, 0, states.inputs(0).read(0))
        with BlockForwards(walker, block, module, states.inputs(0)) as forwards:
            scaling = scale_block(forwards, OPTIONS, schemes, 1)
        after = walker.forward(block, module, 0, states.inputs(0).read(0))
    return walker, scaling, before, after


def read_beside(module: nn.Module, strength: float) -> None:
    normed: dict[str, Tensor] = {}

    def note(_: nn.Module, __: object, given: dict[str, Tensor]) -> None:
        normed["last"] = given["hidden_states"]

    def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output + strength * normed["last"].sin()

    attention = module.get_submodule("self_attn")
    attention.register_forward_pre_hook(note, with_kwargs=True)
    module.register_forward_hook(add)


def outlying_channels(tensors: dict[str, Tensor]) -> None:
    """A few channels far larger than the others, as in real models: what AWQ is for."""
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[3::11] *= 12


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_the_folded_model_in_16_bit_is_the_source_before_anything_is_rounded(
    tmp_path: Path, architecture: str
) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS[architecture](), dtype=torch.bfloat16)
    block = 0 if architecture == "qwen3_moe" else 1  # its second block has no experts
    walker, scaling, before, after = scale(tmp_path, tmp_path / "source", block)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert any(record.alpha > 0 for record in scaling.records)
    for record in scaling.records:
        assert record.error_ratio <= 1 and record.smallest <= 1 <= record.largest
        assert (record.alpha > 0) == (record.smallest < record.largest)
    for name, stored in scaling.tensors.items():
        source = walker.source.read(walker.structure.disk_name(name))
        assert stored.dtype is torch.bfloat16 and stored.shape == source.shape
        assert not torch.equal(stored, source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_stays_in_16_bit_is_scaled_by_powers_of_two(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS["llama"](), dtype=dtype)
    rewrite_tensors(tmp_path / "source", outlying_channels)
    kept = ("k_proj", "up_proj", "o_proj")
    walker, scaling, before, after = scale(tmp_path, tmp_path / "source", kept=kept)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    prefix = walker.structure.block_prefix(1)
    changed = {name.removeprefix(f"{prefix}.") for name in scaling.tensors}
    assert "self_attn.k_proj.weight" in changed and "mlp.up_proj.weight" in changed
    assert "self_attn.o_proj.weight" not in changed  # nothing that is quantized reads v
    for name, stored in scaling.tensors.items():
        ratio = stored.double() / walker.source.read(walker.structure.disk_name(name)).double()
        assert torch.equal(ratio.log2().round(), ratio.log2())


def test_biases_of_scaled_rows_are_scaled_with_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS["qwen2"](), dtype=torch.bfloat16)
    walker, scaling, before, after = scale(tmp_path, tmp_path / "source")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    name = f"{walker.structure.block_prefix(1)}.self_attn.v_proj"
    rows = scaling.linears["self_attn.v_proj"].rows
    assert rows is not None and bool((rows != 1).any())
    bias = walker.source.read(walker.structure.disk_name(f"{name}.bias")).double()
    stored = scaling.tensors[f"{name}.bias"].double()
    torch.testing.assert_close(stored * rows.double(), bias, rtol=1e-6, atol=0)
    assert f"{walker.structure.block_prefix(1)}.self_attn.q_proj.bias" not in scaling.tensors


def test_a_layer_norm_is_folded_with_its_bias(tmp_path: Path) -> None:
    from transformers import StableLmConfig

    config = StableLmConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_parallel_residual=False,
    )
    build_model(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    walker, scaling, before, after = scale(tmp_path, tmp_path / "source")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    norm = f"{walker.structure.block_prefix(1)}.input_layernorm"
    assert {f"{norm}.weight", f"{norm}.bias"} <= set(scaling.tensors)


def test_scales_fold_and_unfold() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator)
    inputs = torch.randn(30, 7, generator=generator)
    scales = LinearScales(torch.rand(5, generator=generator) + 1, torch.rand(7) + 1)
    scaled = scales.fold(weight)
    torch.testing.assert_close(scales.unfold(scaled), weight)
    assert scales.columns is not None and scales.rows is not None
    torch.testing.assert_close(
        (inputs / scales.columns) @ scaled.T * scales.rows, inputs @ weight.T, rtol=1e-4, atol=1e-4
    )
    moments = (inputs / scales.columns).T @ (inputs / scales.columns)
    torch.testing.assert_close(scales.hessian(inputs.T @ inputs), moments, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_recipe_of_two_stages_goes_down_the_road_and_helps(tmp_path: Path, solver: str) -> None:
    source, text = write_job(tmp_path), write_text(tmp_path)
    rewrite_tensors(source, outlying_channels)
    stage = {"solver": solver, "scheme": {"bits": 3, "group_size": 32}}
    recipe = small_recipe(text, stages=[{"kind": "awq", "num_scales": 8}, stage])
    result = quantize(source, recipe, tmp_path / "scaled")
    report = result.report
    assert result.published and len(report.layers) == 21 and len(report.scales) == 12
    assert report.coverage.num_folds > 6 and "mlp.gate_proj" in report.coverage.declined_folds
    fates = {entry.name: str(entry.fate) for entry in report.ledger.entries}
    assert fates["model.layers.0.input_layernorm.weight"] == "scaled"
    assert fates["model.norm.weight"] == "copied"
    assert report.round_trip.num_tensors == len(report.ledger.entries)
    ours = sum(layer.output_error or 0.0 for layer in report.layers)
    assert 0 < ours < 0.8 * sum(layer.plain_output_error or 0.0 for layer in report.layers)
    norms = [open_checkpoint(path).read("model.layers.1.input_layernorm.weight") for path in
             (source, result.path)]  # fmt: skip
    assert norms[0].dtype == norms[1].dtype and not torch.equal(norms[0], norms[1])
    assert all(layer.output_error and layer.num_tokens == 384 for layer in report.layers)


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_second_moments_are_not_held_beside_another_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    """GPTQ gathers its own; rounding uses those of scaling, and needs them no more afterwards."""
    gathered: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def gather(*arguments: Any) -> dict[Group, InputStatistics]:
        alive.append(sum(hessian() is not None for hessian in gathered))
        statistics = block_pass.gather(*arguments)
        if solver == "rtn" or len(alive) % 2:  # the scale stage's, then one pass of the solver
            gathered.extend(weakref.ref(each.hessian) for each in statistics.values())
        return statistics

    monkeypatch.setattr("llmopt.calibration.forwards.gather", gather)
    stage = {"solver": solver, "scheme": {"bits": 4, "group_size": 32}}
    if solver == "gptq":
        stage["true_sequential"] = False
    stages = [{"kind": "awq", "num_scales": 2}, stage]
    quantize(write_job(tmp_path), small_recipe(write_text(tmp_path), stages=stages), tmp_path / "o")
    assert alive == [0] * (6 if solver == "gptq" else 3)


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    list(zip(["gemma3", "llama", "mixtral", "phi3"], [*NARROW, *NARROW], strict=True)),
)
def test_a_block_in_16_bit_is_scaled_as_exactly(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS[architecture](), dtype=dtype)
    rewrite_tensors(tmp_path / "source", outlying_channels)
    _, wide, _, _ = scale(tmp_path, tmp_path / "source")
    _, narrow, before, after = scale(tmp_path, tmp_path / "source", dtype=dtype)
    assert before.dtype is after.dtype is dtype
    assert [record.producer for record in narrow.records] == [r.producer for r in wide.records]
    assert narrow.declined == wide.declined


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_a_norm_that_is_read_beside_the_layers_is_declined_in_every_element_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    from llmopt import scaling

    write_checkpoint(tmp_path / "source", CONFIGS["llama"](), dtype=dtype)
    rewrite_tensors(tmp_path / "source", outlying_channels)
    _, found, _, _ = scale(tmp_path, tmp_path / "source", dtype=dtype, beside=0.01)
    reasons = {each.producer: each.reason for each in found.declined}
    assert reasons["input_layernorm"] == "it reaches the block's output"

    def believe(block: nn.Module, run: Run) -> tuple[list[Fold], list[Declined]]:
        hooks, block._forward_hooks = block._forward_hooks, OrderedDict()
        believed = find_folds(block, run)
        block._forward_hooks = hooks
        return believed

    monkeypatch.setattr(scaling, "find_folds", believe)
    with pytest.raises(NumericalError, match=r"model\.layers\.1 computes something else"):
        scale(tmp_path, tmp_path / "source", dtype=dtype, beside=0.01)


def test_a_block_that_adds_next_to_nothing_is_held_to_the_rounding_of_the_sum() -> None:
    from llmopt.scaling import _check_unchanged

    hidden = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    hidden[..., 4] = 1000.0  # massive in one channel, as first tokens are in real models
    before = hidden + 1e-3 * torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(1))
    rounded, moved = before.clone(), before.clone()
    rounded[0, 3, 4] = torch.nextafter(before[0, 3, 4], torch.tensor(2000.0))
    moved[0, 3, 4] += 0.01
    _check_unchanged("block", hidden, before, rounded)
    with pytest.raises(NumericalError, match="block computes something else"):
        _check_unchanged("block", hidden, before, moved)


def test_a_broken_fold_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt import scaling

    write_checkpoint(tmp_path / "source", CONFIGS["llama"]())

    def forget(self: object, path: str, key: str, value: Tensor) -> None:
        """Folds into the readers and not into what produces."""

    monkeypatch.setattr(scaling._Folder, "_store", forget)
    with pytest.raises(NumericalError, match=r"model\.layers\.1 computes something else"):
        scale(tmp_path, tmp_path / "source")
