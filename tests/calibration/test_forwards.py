"""Forwards that stop at every wave and go on give what running the block again gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.tiny_models import HIDDEN, llama_config, qwen3_moe_config, write_checkpoint
from support.walking import open_walker, random_batch
from torch import Tensor, nn

from llmopt.calibration.block_pass import Group, advance, collect
from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.walker import BlockWalker
from llmopt.errors import NumericalError

BATCHES = [random_batch(2, 11), random_batch(1, 20, seed=3), random_batch(3, 5, seed=4)]
# What a stopped forward of the largest of these batches may hold, at most: some tensors a token.
SOME = 22 * (4 * HIDDEN + 128) * 4


@pytest.fixture(scope="module", params=["dense", "mixture"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, llama_config() if request.param == "dense" else qwen3_moe_config())
    return path


@contextmanager
def first_block(
    checkpoint: Path, scratch: Path
) -> Iterator[tuple[BlockWalker, nn.Module, HiddenStatePair]]:
    walker = open_walker(checkpoint)
    scratch.mkdir(exist_ok=True)
    shapes = [batch.shape for batch in BATCHES]
    states = HiddenStatePair.create(scratch, shapes, HIDDEN, torch.float32)
    walker.start(BATCHES, states.inputs(0))
    with walker.materialise(0) as module:
        yield walker, module, states


def change(module: nn.Module, groups: tuple[Group, ...]) -> None:
    """What a solver does once it has a wave's statistics."""
    for group in groups:
        for path in group:
            module.get_parameter(f"{path}.weight").data.mul_(0.75).round_(decimals=2)


def test_waves_and_outputs_are_those_of_running_the_block_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    hessians: dict[Group, Tensor] = {}
    with first_block(checkpoint, tmp_path / "again") as (walker, module, states):
        waves = walker.structure.waves(0)
        for wave in waves:
            for group, shared in collect(walker, 0, module, states.inputs(0), wave).items():
                hessians[group] = shared.hessian.clone()
            change(module, wave)
        advance(walker, 0, module, states.inputs(0), states.outputs(0))
        expected = [states.outputs(0).read(index) for index in range(len(BATCHES))]
    for held_bytes in (0, SOME, None):
        with (
            first_block(checkpoint, tmp_path / str(held_bytes)) as (walker, module, states),
            BlockForwards(walker, 0, module, states.inputs(0), held_bytes) as forwards,
        ):
            for wave in waves:
                for group, shared in forwards.collect_wave(wave).items():
                    assert torch.equal(shared.hessian, hessians[group])
                change(module, wave)
            forwards.advance(states.outputs(0))
            found = [states.outputs(0).read(index) for index in range(len(BATCHES))]
        assert all(map(torch.equal, found, expected))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    write_checkpoint(path, llama_config())
    return path


def count_runs(dense: Path, scratch: Path, held_bytes: int | None) -> list[int]:
    """How often each wave's first layer ran, of all batches."""
    with first_block(dense, scratch) as (walker, module, states):
        waves = walker.structure.waves(0)
        counts = dict.fromkeys((wave[0][0] for wave in waves), 0)

        def count(name: str) -> None:
            counts[name] += 1

        for name in counts:
            module.get_submodule(name).register_forward_hook(lambda *_, name=name: count(name))
        with BlockForwards(walker, 0, module, states.inputs(0), held_bytes) as forwards:
            for wave in waves:
                forwards.collect_wave(wave)
            forwards.advance(states.outputs(0))
    return list(counts.values())


def test_every_layer_runs_once_where_all_forwards_can_be_held(dense: Path, tmp_path: Path) -> None:
    each = len(BATCHES)
    assert count_runs(dense, tmp_path / "all", None) == [each] * 4
    assert count_runs(dense, tmp_path / "none", 0) == [4 * each, 3 * each, 2 * each, each]
    some = count_runs(dense, tmp_path / "some", SOME)
    assert each < some[0] < 4 * each


def test_collecting_anew_sees_what_was_changed_before_the_stop(dense: Path, tmp_path: Path) -> None:
    with (
        first_block(dense, tmp_path) as (walker, module, states),
        BlockForwards(walker, 0, module, states.inputs(0)) as forwards,
    ):
        (group,) = walker.structure.waves(0)[3]
        before = forwards.collect_wave([group])[group].hessian.clone()
        module.get_parameter("post_attention_layernorm.weight").data.mul_(2)
        after = forwards.collect([group])[group].hessian
        assert float(after.diagonal().sum()) > 2 * float(before.diagonal().sum())
        # Nor does what comes after it go on from where the old block had stopped.
        forwards.advance(states.outputs(0))
        found = [states.outputs(0).read(index) for index in range(len(BATCHES))]
        advance(walker, 0, module, states.inputs(0), states.outputs(0))
        wanted = [states.outputs(0).read(index) for index in range(len(BATCHES))]
        assert all(map(torch.equal, found, wanted))


def test_an_error_half_way_leaves_nothing_behind(dense: Path, tmp_path: Path) -> None:
    with first_block(dense, tmp_path) as (walker, module, states):
        hooks = sum(len(child._forward_pre_hooks) for child in module.modules())
        with (
            pytest.raises(NumericalError, match=r"down_proj"),
            BlockForwards(walker, 0, module, states.inputs(0)) as forwards,
        ):
            waves = walker.structure.waves(0)
            forwards.collect_wave(waves[2])
            for layer in waves[2][0]:
                module.get_parameter(f"{layer}.weight").data.fill_(1e30)
            forwards.collect_wave(waves[3])
        assert torch.is_grad_enabled()
        assert sum(len(child._forward_pre_hooks) for child in module.modules()) == hooks
        assert not forwards._stopped
