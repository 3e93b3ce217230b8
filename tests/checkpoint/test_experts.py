from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import build_model, mixtral_config, qwen3_moe_config
from torch import Tensor, nn

from llmopt.checkpoint.experts import LinearExperts, split_experts
from llmopt.checkpoint.skeleton import build_skeleton
from llmopt.errors import BadInputError

EXPERTS, HIDDEN, INNER, TOKENS = 5, 32, 24, 37


def fused_experts() -> nn.Module:
    model = build_model(qwen3_moe_config())
    model.set_experts_implementation("eager")
    experts: nn.Module = model.model.layers[0].mlp.experts
    return experts


def split(fused: nn.Module) -> LinearExperts:
    experts = LinearExperts(EXPERTS, HIDDEN, INNER, nn.SiLU())
    for index, expert in enumerate(experts.experts):
        gate, up = fused.get_parameter("gate_up_proj")[index].chunk(2)
        expert.gate_proj.weight.data.copy_(gate)
        expert.up_proj.weight.data.copy_(up)
        expert.down_proj.weight.data.copy_(fused.get_parameter("down_proj")[index])
    return experts


def routing(kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and two of the first ``kept`` experts for each with weights beside one."""
    generator = torch.Generator().manual_seed(kept)
    scores = torch.rand(TOKENS, kept, generator=generator)
    weights, index = scores.topk(2, dim=-1)
    return torch.randn(TOKENS, HIDDEN, generator=generator), index, weights


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("kept", [EXPERTS, 3])
@torch.no_grad()
def test_they_compute_what_the_fused_module_does(kept: int, every_token: bool) -> None:
    fused = fused_experts()
    ours = split(fused)
    ours.every_token = every_token
    hidden, index, weights = routing(kept)
    wanted = fused(hidden, index, weights)
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours(hidden, index, weights), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_index_past_the_last_expert_is_nobody() -> None:
    ours = split(fused_experts())
    hidden, index, weights = routing(EXPERTS)
    index[3, 1] = EXPERTS
    silenced = weights.clone()
    silenced[3, 1] = 0
    assert torch.equal(
        ours(hidden, index, weights), ours(hidden, index.clamp(max=EXPERTS - 1), silenced)
    )


@torch.no_grad()
def test_sixteen_bit_states_stay_so_under_float32_weights() -> None:
    ours = split(fused_experts()).bfloat16()
    hidden, index, weights = routing(EXPERTS)
    assert ours(hidden.bfloat16(), index, weights).dtype == torch.bfloat16


@pytest.mark.parametrize("every_token", [False, True])
def test_which_tokens_an_expert_sees_and_that_all_widen_before_any_narrows(
    every_token: bool,
) -> None:
    ours = split(fused_experts())
    ours.every_token = every_token
    seen: dict[int, int] = {}
    order: list[str] = []
    for number, expert in enumerate(ours.experts):
        expert.gate_proj.register_forward_pre_hook(
            lambda _, args, number=number: seen.update({number: len(args[0])})
        )
        expert.up_proj.register_forward_pre_hook(lambda _, args: order.append("up"))
        expert.down_proj.register_forward_pre_hook(lambda _, args: order.append("down"))
    index = torch.tensor([[1, 2], [4, 2], [4, 0]])
    ours(torch.randn(3, HIDDEN), index, torch.full((3, 2), 0.5))
    assert seen == (dict.fromkeys(range(EXPERTS), 3) if every_token else {0: 1, 1: 1, 2: 2, 4: 2})
    assert order == ["up"] * len(seen) + ["down"] * len(seen)


def meta_skeleton(config: Any) -> Any:
    return build_skeleton(config.to_dict(), config)


@pytest.mark.parametrize("config", [qwen3_moe_config, mixtral_config])
def test_a_skeletons_fused_experts_become_linear_layers(config: Any) -> None:
    skeleton = meta_skeleton(config())
    experts = skeleton.model.layers[2].mlp.experts
    assert isinstance(experts, LinearExperts) and not experts.training
    assert all(p.is_meta and p.ndim < 3 and not p.requires_grad for p in skeleton.parameters())


def gpt_oss_config() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_local_experts=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def test_another_layout_is_refused_by_name() -> None:
    with pytest.raises(BadInputError, match=r"layers\.0\.mlp\.experts \(GptOss.*down_proj_bias"):
        meta_skeleton(gpt_oss_config())


class _OwnGate(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        gate_up, down = ((3, 8, 20), (3, 10, 8)) if transposed else ((3, 20, 8), (3, 8, 10))
        self.gate_up_proj = nn.Parameter(torch.empty(gate_up, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(down, device="meta"))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gate_up.clamp(max=7).chunk(2, dim=-1)[0]


@pytest.mark.parametrize(("transposed", "why"), [(False, "gate of its own"), (True, "transposed")])
def test_experts_that_compute_something_else_are_refused(transposed: bool, why: str) -> None:
    model: Any = nn.ModuleDict({"experts": _OwnGate(transposed)})
    with pytest.raises(BadInputError, match=why):
        split_experts(model)
