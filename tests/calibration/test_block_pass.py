"""Mixtures of experts in the pass that gathers statistics; dense blocks are in test_walker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.tiny_models import HIDDEN, qwen3_moe_config, write_checkpoint
from support.walking import open_walker, random_batch
from torch import Tensor, nn

from llmopt.calibration.block_pass import Group, check_experts, collect
from llmopt.calibration.hidden_states import HiddenStatePair, HiddenStates
from llmopt.calibration.statistics import InputStatistics
from llmopt.calibration.walker import BlockWalker, TokenBatch
from llmopt.checkpoint.experts import LinearExperts
from llmopt.errors import BadInputError, NumericalError

NUM_EXPERTS = 5
BATCHES = [random_batch(2, 11), random_batch(1, 20, seed=3)]
NUM_TOKENS = 42


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture")
    write_checkpoint(path, qwen3_moe_config())
    return path


@contextmanager
def first_block(
    checkpoint: Path, scratch: Path, batches: list[TokenBatch] = BATCHES
) -> Iterator[tuple[BlockWalker, nn.Module, HiddenStates]]:
    walker = open_walker(checkpoint)
    shapes = [batch.shape for batch in batches]
    states = HiddenStatePair.create(scratch, shapes, HIDDEN, torch.float32)
    walker.start(batches, states.inputs(0))
    with walker.materialise(0) as module:
        yield walker, module, states.inputs(0)


def never_route_to(module: nn.Module, expert: int) -> None:
    """Let the block's router send every token elsewhere."""
    top_k = module.get_submodule("mlp.gate").forward

    def route(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits: Tensor = top_k(hidden)[0].clone()
        logits[:, expert] = -torch.inf
        weights, index = logits.softmax(dim=-1).topk(2)
        return logits, weights, index

    module.get_submodule("mlp.gate").forward = route  # type: ignore[method-assign]


def test_an_expert_has_the_statistics_of_the_tokens_routed_to_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    with first_block(checkpoint, tmp_path) as (walker, module, inputs):
        waves = walker.structure.waves(0)
        seen: dict[str, list[Tensor]] = {}
        handles = [
            module.get_submodule(group[0]).register_forward_pre_hook(
                lambda _, args, name=group[0]: seen.setdefault(name, []).append(args[0])
            )
            for group in (*waves[2], *waves[3])
        ]
        for index in range(len(BATCHES)):
            walker.forward(0, module, index, inputs.read(index))
        for handle in handles:
            handle.remove()
        gathered = [collect(walker, 0, module, inputs, wave) for wave in waves]
        together = collect(walker, 0, module, inputs, sum(waves, ()))
    for wave in gathered[2:]:
        assert sum(shared.num_tokens for shared in wave.values()) == 2 * NUM_TOKENS
    for group, shared in (gathered[2] | gathered[3]).items():
        rows = torch.cat(seen[group[0]])
        assert shared.num_tokens == len(rows) > 0
        torch.testing.assert_close(
            shared.hessian, 2 / len(rows) * rows.T @ rows, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(together[group].hessian, shared.hessian)
    assert gathered[0][waves[0][0]].num_tokens == NUM_TOKENS


def test_a_pass_ends_before_the_first_layer_that_nobody_wants(
    checkpoint: Path, tmp_path: Path
) -> None:
    reached: list[str] = []
    with first_block(checkpoint, tmp_path) as (walker, module, inputs):
        never_route_to(module, expert=3)
        for name in ("mlp.experts.4.up_proj", "mlp.experts.0.down_proj"):
            module.get_submodule(name).register_forward_hook(
                lambda _, __, ___, name=name: reached.append(name)
            )
        statistics = collect(walker, 0, module, inputs, walker.structure.waves(0)[2])
    assert set(reached) == {"mlp.experts.4.up_proj"}
    counts = [shared.num_tokens for shared in statistics.values()]
    assert counts[3] == 0 and sum(counts) == 2 * NUM_TOKENS


def test_starved_experts_are_named_with_what_they_saw(checkpoint: Path, tmp_path: Path) -> None:
    with first_block(checkpoint, tmp_path) as (walker, module, inputs):
        never_route_to(module, expert=3)
        waves = walker.structure.waves(0)
        statistics = collect(walker, 0, module, inputs, waves[2])
    structure = walker.structure
    fed = sorted(shared.num_tokens for shared in statistics.values())[1]
    with pytest.raises(BadInputError) as caught:
        check_experts(structure, 0, statistics, min_tokens=fed)
    assert re.findall(r"model\.layers\.0\.mlp\.experts\.\d \(\d+\)", caught.value.what) == [
        "model.layers.0.mlp.experts.3 (0)"
    ]
    assert "min_expert_tokens" in caught.value.remedy
    with pytest.raises(BadInputError, match=r"starves 5 experts"):
        check_experts(structure, 0, statistics, min_tokens=2 * NUM_TOKENS + 1)
    dense: dict[Group, InputStatistics] = {
        waves[1][0]: InputStatistics("o_proj", HIDDEN)  # no expert, whatever it saw
    }
    check_experts(structure, 0, dense | {waves[2][0]: statistics[waves[2][0]]}, min_tokens=1)


def test_infinity_in_an_experts_input_names_layer_and_samples(
    checkpoint: Path, tmp_path: Path
) -> None:
    batches = [TokenBatch(random_batch(2, 5).token_ids, names=("one.txt", "two.txt"))]
    with first_block(checkpoint, tmp_path, batches) as (walker, module, inputs):
        experts = module.get_submodule("mlp.experts")
        assert isinstance(experts, LinearExperts)
        for expert in experts.experts:
            expert.up_proj.weight.data.fill_(3e38)
        with pytest.raises(NumericalError, match=r"experts\.\d\.down_proj.*one\.txt to two\.txt"):
            collect(walker, 0, module, inputs, walker.structure.waves(0)[3])
