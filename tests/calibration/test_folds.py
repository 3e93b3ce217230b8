from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import CONFIGS, write_checkpoint
from support.walking import open_walker, random_batch
from torch import Tensor, nn

from llmopt.calibration.folds import Fold, find_folds
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.probing import role_of

NORM = {"input_layernorm": "self_attn: q_proj k_proj v_proj"}
ATTENTION = {"self_attn.v_proj": "self_attn: o_proj"}
MLP = {"mlp.up_proj": "mlp: down_proj"}
AFTER = {"post_attention_layernorm": "mlp: gate_proj up_proj"}
BEFORE = {"pre_feedforward_layernorm": "mlp: gate_proj up_proj"}
EXPERTS = {
    "post_attention_layernorm": "mlp: gate experts.*.gate_proj experts.*.up_proj",
    "mlp.experts.*.up_proj": "mlp: experts.*.down_proj",
}
LLAMA = NORM | ATTENTION | AFTER | MLP
GEMMA = NORM | ATTENTION | BEFORE | MLP
WANTED = {
    "llama": LLAMA,
    "llama_biased": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_multimodal": GEMMA,
    "olmo2": ATTENTION | MLP,  # its norms come after the layers
    "phi3": {
        "input_layernorm": "self_attn: qkv_proj",
        "self_attn.qkv_proj": "self_attn: o_proj",
        "post_attention_layernorm": "mlp: gate_up_proj",
        "mlp.gate_up_proj": "mlp: down_proj",
    },
    "qwen3_moe": NORM | ATTENTION | EXPERTS,
    "mixtral": NORM | ATTENTION | EXPERTS,
}
ONE_PLUS_WEIGHT = {"gemma2", "gemma3", "gemma3_multimodal"}


def of_checkpoint(folder: Path, block: int = 0) -> tuple[list[Fold], dict[str, str]]:
    walker = open_walker(folder / "source")
    batch = random_batch(1, 11)
    states = HiddenStatePair.create(
        folder, [batch.shape], walker.structure.hidden_size, walker.dtype
    )
    walker.start([batch], states.inputs(0))
    with walker.materialise(block) as module:
        before = {name: value.clone() for name, value in module.state_dict().items()}
        folds, declined = find_folds(
            module, lambda: walker.forward(block, module, 0, states.inputs(0).read(0))
        )
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert not any(child._forward_hooks or child._forward_pre_hooks
                       for child in module.modules())  # fmt: skip
    return folds, {each.producer: each.reason for each in declined}


def in_words(fold: Fold) -> str:
    room = fold.readers[0].partition(".")[0]
    readers = dict.fromkeys(role_of(reader).removeprefix(f"{room}.") for reader in fold.readers)
    return f"{room}: {' '.join(readers)}"


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_the_folds_of_every_family_are_found_without_a_table(
    tmp_path: Path, architecture: str
) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS[architecture]())
    folds, declined = of_checkpoint(tmp_path)
    assert {role_of(fold.producer): in_words(fold) for fold in folds} == WANTED[architecture]
    for fold in folds:
        offset = 1.0 if architecture in ONE_PLUS_WEIGHT else 0.0
        assert fold.norm_offset == (offset if "norm" in fold.producer else None)
    norms = {name for name in declined if name.endswith(("q_norm", "k_norm"))}
    assert len(norms) == (2 if architecture.startswith(("qwen3", "gemma3", "olmo2")) else 0)


def test_query_heads_that_share_a_value_head_share_its_channels(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", CONFIGS["phi3"]())
    (fold,) = [f for f in of_checkpoint(tmp_path)[0] if f.producer == "self_attn.qkv_proj"]
    # Four query heads of 8 and two key and value heads: the last 16 of 64 rows are the values.
    assert (fold.first_row, fold.num_channels) == (48, 16)
    first, second = torch.arange(8), torch.arange(8, 16)
    assert torch.equal(fold.channels, torch.cat([first, first, second, second]))


class Block(nn.Module):
    """A norm, two branches and a residual, with one thing changed by each test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.gate, self.up = nn.Linear(6, 8), nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def act(self, gate: Tensor) -> Tensor:
        return torch.sigmoid(gate)

    def beside(self, normed: Tensor, output: Tensor) -> Tensor:
        return output

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        output = hidden + self.down(self.act(self.gate(normed)) * self.up(normed))
        return self.beside(normed, output)


class Relu(Block):
    def act(self, gate: Tensor) -> Tensor:
        return torch.relu(gate)


class SecretReader(Block):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength

    def beside(self, normed: Tensor, output: Tensor) -> Tensor:
        return output + self.strength * torch.sin(normed)


class Router(nn.Module):
    """Reads through its weight, and past it as well where ``honest`` is off."""

    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.weight, self.honest = nn.Parameter(torch.randn(3, 6)), honest

    def forward(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.weight.T
        return logits if self.honest else logits + hidden.mean(dim=-1, keepdim=True)


class Routed(Block):
    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.router = Router(honest)

    def beside(self, normed: Tensor, output: Tensor) -> Tensor:
        return output * self.router(normed).softmax(-1)[..., :1]


class Twice(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(super().forward(hidden))


def found(block: Block) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    hidden = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(1))
    before = {name: (value, value.clone()) for name, value in block.state_dict().items()}
    folds, declined = find_folds(block, lambda: block(hidden.to(block.norm.weight.dtype)))
    for name, value in block.state_dict().items():
        assert value.dtype is before[name][0].dtype and torch.equal(value, before[name][1])
    return (
        {fold.producer: fold.readers for fold in folds},
        {each.producer: each.reason for each in declined},
    )


def test_a_layer_norm_with_a_bias_and_what_goes_into_a_product() -> None:
    folds, declined = found(Block())
    assert folds == {"norm": ("gate", "up"), "up": ("down",)}
    assert declined["gate"] == "down does not take it up channel by channel"
    assert set(declined) == {"gate", "down"}


def test_a_reader_is_scaled_through_one_producer_alone() -> None:
    folds, declined = found(Relu())  # relu lets positive factors through, so the gate would do too
    assert folds == {"norm": ("gate", "up"), "gate": ("down",)}
    assert declined["up"] == "down is scaled through gate already"


def test_who_reads_past_the_layers_is_noticed_in_the_blocks_output() -> None:
    folds, declined = found(SecretReader())
    assert folds == {"up": ("down",)} and declined["norm"] == "it reaches the block's output"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strength", [0.1, 0.05, 0.02, 0.01, 0.001, 1e-4])
def test_who_reads_past_the_layers_is_noticed_in_every_element_type(
    dtype: torch.dtype, strength: float
) -> None:
    folds, declined = found(SecretReader(strength).to(dtype))
    assert folds == {"up": ("down",)} and declined["norm"] == "it reaches the block's output"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_blocks_fold_as_wide_ones_do(dtype: torch.dtype) -> None:
    assert found(Block().to(dtype))[0] == found(Block())[0]
    assert found(Routed(honest=True).to(dtype))[0]["norm"] == ("gate", "up", "router")


def test_a_router_is_a_reader_if_it_goes_by_its_weight() -> None:
    assert found(Routed(honest=True))[0]["norm"] == ("gate", "up", "router")
    folds, declined = found(Routed(honest=False))
    assert "norm" not in folds
    assert declined["norm"] == "router uses its input otherwise than through its weight"


def test_layers_that_run_twice_are_left_alone() -> None:
    assert found(Twice())[0] == {}
