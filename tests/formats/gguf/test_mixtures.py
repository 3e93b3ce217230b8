"""The rules as llama.cpp's output shows them; tests/interop compares them all with the library."""

from __future__ import annotations

import gguf
import pytest

from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures import ModelFacts
from llmopt.formats.gguf.mixtures import MIXTURES, find_mixture, tensor_types

FACTS = ModelFacts("llama", 8, 4, 2, 0)
WIDTH = 512


def tensors(width: int = WIDTH, blocks: int = 8, tied: bool = False) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, width)}
    for block in range(blocks):
        for base in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down"):
            found[f"blk.{block}.{base}.weight"] = (64, width)
        found[f"blk.{block}.attn_norm.weight"] = (width,)
        found[f"blk.{block}.attn_q.bias"] = (width,)
    found["output_norm.weight"] = (width,)
    if not tied:
        found["output.weight"] = (100, width)
    return found


def types(name: str, weighted: bool = False, facts: ModelFacts = FACTS, **changes: int) -> dict:
    chosen = tensor_types(
        find_mixture(name), facts, tensors(**changes).items(), has_importance=weighted
    )
    return {key: value.type.name for key, value in chosen.items()}


def test_q4_k_m_gives_more_bits_where_it_matters() -> None:
    found = types("Q4_K_M")
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q4_K"
    lifted = [block for block in range(8) if found[f"blk.{block}.attn_v.weight"] == "Q6_K"]
    assert lifted == [0, 3, 6, 7]
    assert [b for b in range(8) if found[f"blk.{b}.ffn_down.weight"] == "Q6_K"] == lifted
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    assert {found[key] for key in found if "norm" in key or "bias" in key} == {"F32"}


def test_an_embedding_that_serves_as_head_is_treated_as_one() -> None:
    assert types("Q4_K_M", tied=True)["token_embd.weight"] == "Q6_K"
    assert types("Q8_0", tied=True)["token_embd.weight"] == "Q8_0"
    assert types("F16", tied=True)["token_embd.weight"] == "F16"


def test_an_importance_matrix_moves_rules() -> None:
    assert types("Q4_0")["blk.0.ffn_down.weight"] == "Q4_0"
    assert types("Q4_0", weighted=True)["blk.0.ffn_down.weight"] == "Q4_1"
    assert types("IQ4_NL")["blk.0.ffn_down.weight"] == "Q5_K"
    assert types("IQ4_NL", weighted=True)["blk.0.ffn_down.weight"] == "IQ4_NL"


def test_shared_heads_eight_experts_and_seventy_billions_have_rules() -> None:
    shared = ModelFacts("llama", 8, 8, 2, 0)
    assert types("Q2_K")["blk.4.attn_v.weight"] == "Q3_K"
    assert types("Q2_K", facts=shared)["blk.4.attn_v.weight"] == "Q4_K"
    eight = ModelFacts("llama", 8, 4, 2, 8)
    assert types("Q4_K_M", facts=eight)["blk.4.attn_v.weight"] == "Q8_0"
    assert types("Q4_K_M", facts=eight)["blk.4.attn_k.weight"] == "Q8_0"
    assert types("Q4_K_M", facts=eight)["blk.4.attn_output.weight"] == "Q5_K"
    large = ModelFacts("llama", 80, 64, 8, 0)
    assert types("Q4_K_S", facts=large, blocks=80)["blk.40.attn_v.weight"] == "Q5_K"


def test_rows_that_are_not_whole_blocks_fall_back_and_say_so() -> None:
    chosen = tensor_types(
        find_mixture("Q4_K_M"), FACTS, tensors(width=288).items(), has_importance=False
    )
    assert chosen["blk.0.attn_q.weight"].type.name == "Q5_0"
    assert chosen["blk.0.attn_q.weight"].wanted.name == "Q4_K"
    assert chosen["blk.0.attn_q.weight"].is_fallback
    assert chosen["output.weight"].type.name == "Q8_0"
    assert not chosen["blk.0.attn_norm.weight"].is_fallback
    assert types("Q4_K_M", width=40)["blk.0.attn_q.weight"] == "F16"


def test_routers_stay_exact() -> None:
    shapes = {"blk.0.ffn_gate_inp.weight": (8, 512), "blk.0.ffn_up_exps.weight": (8, 64, 512)}
    chosen = tensor_types(find_mixture("Q2_K"), FACTS, shapes.items(), has_importance=False)
    assert [c.type.name for c in chosen.values()] == ["F32", "Q2_K"]


def test_file_types_are_llama_cpps() -> None:
    for mixture in MIXTURES.values():
        name = "ALL_F32" if mixture.name == "F32" else f"MOSTLY_{mixture.name}"
        assert gguf.LlamaFileType[name] == mixture.file_type


def test_an_unknown_kind_is_refused_with_the_closest() -> None:
    with pytest.raises(BadInputError, match="did you mean Q4_K_M"):
        find_mixture("q4_k_m")
    with pytest.raises(BadInputError, match=r"(?s)'nothing'.*the kinds are F32, F16"):
        find_mixture("nothing")
