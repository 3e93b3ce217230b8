from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    CONFIGS,
    HIDDEN,
    VOCABULARY,
    WINDOW,
    llama_config,
    rewrite_tensors,
    write_checkpoint,
)
from support.walking import open_walker, random_batch, walk
from torch import Tensor, nn

from llmopt.calibration import walker as walker_module
from llmopt.calibration.block_pass import advance, collect
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.walker import BlockWalker, TokenBatch, calibration_walker
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.checkpoint.tensor_source import TensorInfo, TensorSource
from llmopt.errors import BadInputError, NumericalError

TOLERANCE = 1e-5


def prefix_shared_batch(prefix: int, branches: int, length: int) -> TokenBatch:
    """A prefix and several continuations of it in one row; continuations do not see each other."""
    total = prefix + branches * length
    branch = torch.cat([torch.full((prefix,), -1), torch.arange(branches * length) // length])
    position = torch.cat([torch.arange(prefix), prefix + torch.arange(length).repeat(branches)])
    same = (branch[:, None] == branch[None]) | (branch == -1)[None]
    mask = same & torch.ones(total, total, dtype=torch.bool).tril()
    tokens = random_batch(2, total, seed=7).token_ids
    return TokenBatch(tokens, position[None].expand(2, -1), mask[None, None].expand(2, 1, -1, -1))


def additive(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@torch.no_grad()
def reference(model: Any, batch: TokenBatch) -> tuple[list[Tensor], Tensor]:
    output = model(
        input_ids=batch.token_ids,
        attention_mask=additive(batch.attention_mask),
        position_ids=batch.position_ids,
        use_cache=False,
        output_hidden_states=True,
    )
    return list(output.hidden_states), output.logits


def assert_walk_equals_model(directory: Path, model: Any, scratch: Path) -> None:
    walker = open_walker(directory)
    shared = prefix_shared_batch(prefix=13, branches=3, length=5)
    batches = [
        random_batch(2, 33),
        random_batch(1, 50, seed=1),
        random_batch(2, 33, seed=2),
        shared,
        TokenBatch(shared.token_ids, shared.position_ids, additive(shared.attention_mask)),
    ]
    inputs, _ = walk(walker, batches, scratch)
    head = walker.head()
    for index, batch in enumerate(batches):
        hidden, logits = reference(model, batch)
        assert logits.std() > 0.3  # a model with something to say
        for block in range(walker.structure.num_blocks):
            torch.testing.assert_close(
                inputs[block][index], hidden[block], atol=TOLERANCE, rtol=TOLERANCE
            )
        ours = head.logits(inputs[-1][index].reshape(-1, HIDDEN)).reshape(logits.shape)
        torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_walk_equals_the_transformers_model(name: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS[name]())
    assert_walk_equals_model(tmp_path / "model", model, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_walk_with_the_other_kind_of_head_in_several_shards(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name](tie_word_embeddings=name == "llama")
    model = write_checkpoint(tmp_path / "model", config, max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    assert_walk_equals_model(tmp_path / "model", model, tmp_path)


def test_walk_over_a_wrapper_with_names_in_memory(tmp_path: Path) -> None:
    config = CONFIGS["gemma3_multimodal"]()
    model = write_checkpoint(tmp_path / "model", config, names_in_memory=True)
    assert_walk_equals_model(tmp_path / "model", model, tmp_path)


@pytest.mark.parametrize("has_products", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_calibration_computes_in_bfloat16_where_that_is_exact_and_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, has_products: bool
) -> None:
    monkeypatch.setattr(walker_module, "_has_bf16_products", lambda: has_products)
    write_checkpoint(tmp_path / "model", llama_config(), dtype=stored)
    reader = open_checkpoint(tmp_path / "model")
    walker = calibration_walker(read_structure(reader), reader, "cpu")
    narrow = has_products and stored == torch.bfloat16
    assert walker.dtype == (torch.bfloat16 if narrow else torch.float32)


def test_sixteen_bit_checkpoint_is_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", llama_config(), dtype=torch.bfloat16)
    assert open_walker(tmp_path / "model").dtype == torch.float32
    assert_walk_equals_model(tmp_path / "model", model, tmp_path)


def test_windows_and_masks_of_the_test_matter(tmp_path: Path) -> None:
    """The comparisons above would be blind if the architectures' masks made no difference."""
    model = write_checkpoint(tmp_path / "mistral", CONFIGS["mistral"]())
    batch = random_batch(1, 50)
    windowed = reference(model, batch)[1]
    causal = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]
    full = reference(model, TokenBatch(batch.token_ids, None, causal))[1]
    assert (windowed - full)[:, :WINDOW].abs().max() < TOLERANCE
    assert (windowed - full)[:, WINDOW:].abs().max() > 0.01


def test_prefix_shared_scoring_equals_separate_sequences(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS["qwen3"]())
    shared = prefix_shared_batch(prefix=13, branches=3, length=5)
    walker = open_walker(tmp_path / "model")
    inputs, _ = walk(walker, [shared], tmp_path)
    ours = walker.head().logits(inputs[-1][0][1])
    tokens = shared.token_ids[1]
    for branch in range(3):
        start = 13 + 5 * branch
        alone = torch.cat([tokens[:13], tokens[start : start + 5]])
        logits = reference(model, TokenBatch(alone[None]))[1][0]
        torch.testing.assert_close(
            ours[start : start + 5], logits[13:], atol=TOLERANCE, rtol=TOLERANCE
        )


class WatchedSource:
    """Counts the bytes of parameters in memory: on demand, and where the walk's ends are read."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.peak_bytes = 0

    @property
    def names(self) -> tuple[str, ...]:
        return self.source.names

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name)

    def read(self, name: str) -> Tensor:
        if "layers" not in name:  # looking at every object of the process takes its time
            self.note()
        return self.source.read(name)

    def note(self) -> None:
        held = {
            tensor.data_ptr(): tensor.nbytes
            for tensor in gc.get_objects()
            if type(tensor) is nn.Parameter and not tensor.is_meta
        }
        self.peak_bytes = max(self.peak_bytes, sum(held.values()))


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", llama_config())
    gc.collect()
    reader = open_checkpoint(tmp_path / "model")
    watched = WatchedSource(reader)
    watched.note()
    before, watched.peak_bytes = watched.peak_bytes, 0
    structure = read_structure(reader)
    walker = BlockWalker(structure, watched)
    batches = [random_batch(2, 9)]
    states = HiddenStatePair.create(tmp_path, [(2, 9)], HIDDEN, torch.float32)
    walker.start(batches, states.inputs(0))
    kept = []  # a caller that holds on to modules holds no weights
    for block in range(structure.num_blocks):
        with walker.materialise(block) as module:
            watched.note()
            advance(walker, block, module, states.inputs(block), states.outputs(block))
        kept.append(module)
    walker.head().logits(states.inputs(structure.num_blocks).tokens(0, 18))
    block_bytes = sum(
        reader.info(structure.disk_name(name)).num_bytes for name in structure.block_tensor_names(0)
    )
    assert watched.peak_bytes - before == block_bytes


def test_a_block_is_a_copy_that_a_solver_may_change(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", llama_config())
    walker = open_walker(tmp_path / "model")
    with walker.materialise(1) as module:
        original = module.self_attn.q_proj.weight.clone()
        module.self_attn.q_proj.weight.zero_()
    with walker.materialise(1) as module:
        assert torch.equal(module.self_attn.q_proj.weight, original)


def test_vocabulary_chunks_do_not_change_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS["gemma2"]())
    monkeypatch.setattr("llmopt.calibration.head._CHUNK_BYTES", 4 * HIDDEN * 10)
    hidden = torch.randn(7, HIDDEN)
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(hidden))
        expected = 3.0 * torch.tanh(logits / 3.0)
    ours = open_walker(tmp_path / "model").head().logits(hidden)
    assert ours.shape == (7, VOCABULARY)
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_calls_are_remembered_for_a_few_shapes_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", llama_config())
    walker = open_walker(tmp_path / "model")
    batches = [random_batch(1, tokens) for tokens in range(3, 23)]
    inputs, _ = walk(walker, batches, tmp_path)
    assert len(walker._calls) == 8
    assert inputs[-1][0].shape == (1, 3, HIDDEN)


def test_collect_sees_what_the_model_feeds_its_layers(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS["gemma2"]())
    batches = [random_batch(2, 11), random_batch(1, 20, seed=3)]
    walker = open_walker(tmp_path / "model")
    states = HiddenStatePair.create(
        tmp_path, [batch.shape for batch in batches], HIDDEN, torch.float32
    )
    walker.start(batches, states.inputs(0))
    with walker.materialise(0) as module:
        advance(walker, 0, module, states.inputs(0), states.outputs(0))
    groups = walker.structure.input_groups(1)
    assert groups == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    with walker.materialise(1) as module:
        together = collect(walker, 1, module, states.inputs(1), groups)
        alone = collect(walker, 1, module, states.inputs(1), groups[2:3])
    for group in groups:
        seen: list[Tensor] = []
        linear = model.model.layers[1].get_submodule(group[-1])
        handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for batch in batches:
            reference(model, batch)
        handle.remove()
        rows = torch.cat([inputs.reshape(-1, inputs.shape[-1]) for inputs in seen])
        expected = 2 / 42 * rows.T @ rows
        torch.testing.assert_close(together[group].hessian, expected, atol=1e-4, rtol=1e-4)
        assert together[group].num_tokens == 42
    assert list(alone) == [groups[2]]
    assert torch.equal(alone[groups[2]].hessian, together[groups[2]].hessian)


def test_collect_stops_after_the_last_wanted_group(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", llama_config())
    walker = open_walker(tmp_path / "model")
    states = HiddenStatePair.create(tmp_path, [(1, 5)], HIDDEN, torch.float32)
    walker.start([random_batch(1, 5)], states.inputs(0))
    reached: list[str] = []
    with walker.materialise(0) as module:
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
            module.get_submodule(name).register_forward_hook(
                lambda _, __, ___, name=name: reached.append(name)
            )
        groups = walker.structure.input_groups(0)[:2]
        statistics = collect(walker, 0, module, states.inputs(0), groups)
        assert reached == ["self_attn.q_proj"]
        assert set(statistics) == set(groups)
        advance(walker, 0, module, states.inputs(0), states.outputs(0))  # hooks are gone
    assert reached == ["self_attn.q_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"]


def test_infinite_activation_names_layer_and_sample(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", llama_config())

    def blow_up(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)

    rewrite_tensors(tmp_path / "model", blow_up)
    walker = open_walker(tmp_path / "model")
    batches = [
        TokenBatch(random_batch(2, 5).token_ids, names=("essays/one.txt", "essays/two.txt")),
    ]
    states = HiddenStatePair.create(tmp_path, [(2, 5)], HIDDEN, torch.float32)
    walker.start(batches, states.inputs(0))
    with walker.materialise(0) as module:
        advance(walker, 0, module, states.inputs(0), states.outputs(0))
    with walker.materialise(1) as module:
        with pytest.raises(NumericalError, match=r"output of model\.layers\.1\.mlp\.up_proj.*one"):
            advance(walker, 1, module, states.inputs(1), states.outputs(1))
        group = walker.structure.input_groups(1)[3:]
        with pytest.raises(NumericalError, match=r"input of model\.layers\.1\.mlp\.down_proj.*one"):
            collect(walker, 1, module, states.inputs(1), group)


def test_token_outside_the_embedding_is_bad_input(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", llama_config())
    walker = open_walker(tmp_path / "model")
    with pytest.raises(BadInputError, match=rf"token id {VOCABULARY} in batch 0"):
        walker.resume([TokenBatch(torch.tensor([[1, VOCABULARY]]))])
