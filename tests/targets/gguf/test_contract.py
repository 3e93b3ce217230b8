"""What does not fit a GGUF file is refused before the first block is read, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_jobs import gguf_recipe, write_wide_job
from support.small_jobs import write_job
from support.tiny_models import rewrite_config

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.errors import BadInputError, ContractError
from llmopt.formats.gguf.imatrix import ImportanceEntry, ImportanceMatrix, write_imatrix
from llmopt.job import check
from llmopt.targets.gguf.contract import GGUFContract, draw_gguf_contract


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_job(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("mixtral"), "mixtral")


def contract(source: Path, kind: str = "Q4_K_M", **changes: Any) -> GGUFContract:
    reader = open_checkpoint(source)
    return draw_gguf_contract(reader, read_structure(reader), gguf_recipe("x.txt", kind, **changes))


def types(agreed: GGUFContract) -> dict[str, str]:
    assert agreed.plan is not None
    return {name: chosen.type.name for name, chosen in agreed.plan.types.items()}


def test_a_mixture_gives_every_tensor_its_type_and_vectors_stay_float32(source: Path) -> None:
    agreed = contract(source)
    agreed.enforce()
    given = types(agreed)
    assert given["token_embd.weight"] == "Q4_K" and given["output.weight"] == "Q6_K"
    assert given["blk.0.attn_norm.weight"] == given["output_norm.weight"] == "F32"
    assert {given["blk.1.ffn_down.weight"], given["blk.0.attn_q.weight"]} == {"Q4_K", "Q6_K"}
    details = {item.name: item.detail for item in agreed.checks}
    assert details["architecture"] == "llama" and details["tokenizer"].startswith("gpt2, gpt-2")
    assert "F32" in details["types"] and "whole blocks" not in details["types"]
    assert [consumer.name for consumer in agreed.consumers] == ["llama.cpp"]


def test_a_bare_type_is_given_to_every_matrix(source: Path) -> None:
    given = types(contract(source, "Q5_K"))
    assert {name for name, kind in given.items() if kind != "Q5_K"} == {
        name for name in given if "norm" in name
    }


def test_overrides_and_ignored_layers(source: Path) -> None:
    stage = {
        "ignore": ["lm_head", "*.0.self_attn.v_proj"],
        "overrides": [{"match": "*.down_proj", "scheme": {"type": "Q8_0"}}],
    }
    given = types(contract(source, stage=stage))
    assert given["output.weight"] == given["blk.0.attn_v.weight"] == "BF16"
    assert given["blk.0.ffn_down.weight"] == given["blk.1.ffn_down.weight"] == "Q8_0"
    assert given["blk.0.ffn_up.weight"] == "Q4_K"


def test_an_embedding_that_serves_as_head_goes_by_both_names(tmp_path: Path) -> None:
    tied = write_wide_job(tmp_path, tie_word_embeddings=True)
    assert types(contract(tied))["token_embd.weight"] == "Q6_K"
    for name in ("lm_head", "*.embed_tokens"):
        kept = contract(tied, stage={"ignore": [name]})
        assert types(kept)["token_embd.weight"] == "BF16"
        other = [{"match": name, "scheme": {"type": "Q8_0"}}]
        assert types(contract(tied, stage={"overrides": other}))["token_embd.weight"] == "Q8_0"


def test_rows_that_are_no_whole_blocks_fall_back_and_the_contract_names_them(
    tmp_path: Path,
) -> None:
    agreed = contract(write_job(tmp_path))  # rows of 32 and 64
    agreed.enforce()
    assert agreed.plan is not None
    assert "token_embd.weight Q5_0 instead of Q4_K" in agreed.plan.fallbacks
    detail = next(item.detail for item in agreed.checks if item.name == "types")
    assert "Q5_0 instead of Q4_K" in detail and "as llama.cpp does it" in detail


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Q4_K_X", {}, "'Q4_K_X' is no GGUF type .*did you mean Q4_K_"),
        ("IQ2_XXS", {}, "is no GGUF type that llmopt writes"),
        (
            "Q4_K_M",
            {"stage": {"overrides": [{"match": "*.down_proj", "scheme": {"type": "Q5_K_M"}}]}},
            "Q5_K_M is a mixture of several",
        ),
        ("Q4_K_M", {"output": {"consumers": ["vllm"]}}, "it does not open GGUF"),
        ("Q4_K_M", {"output": {"consumers": ["autoawq"]}}, "it reads AWQ files only"),
        ("Q4_K_M", {"output": {"consumers": ["llama-cpp"]}}, "did you mean 'llama.cpp'"),
        ("Q4_K_M", {"stage": {"ignore": ["*.gproj"]}}, "matches no linear layer"),
    ],
)
def test_what_does_not_fit_is_refused(
    source: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        contract(source, kind, **changes).enforce()


def test_experts_of_a_block_are_one_tensor_and_have_one_type(mixture: Path) -> None:
    def override(pattern: str) -> dict[str, Any]:
        return {"overrides": [{"match": pattern, "scheme": {"type": "Q8_0"}}]}

    whole = types(contract(mixture, "Q4_0", stage=override("*.experts.*.down_proj")))
    assert whole["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert whole["blk.0.ffn_gate_inp.weight"] == "F32"
    with pytest.raises(ContractError, match="ffn_down_exps.weight are one tensor"):
        contract(mixture, "Q4_0", stage=override("*.experts.1.down_proj")).enforce()


def test_what_llama_cpp_cannot_say_is_a_refusal_like_any_other(tmp_path: Path) -> None:
    folder = write_wide_job(tmp_path)
    rewrite_config(folder, hidden_act="relu")
    agreed = contract(folder)
    assert agreed.plan is None
    with pytest.raises(ContractError, match="architecture: .*relu"):
        agreed.enforce()


def test_a_tokenizer_that_llama_cpp_does_not_have_is_a_refusal(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = write_wide_job(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a").save_pretrained(folder)
    with pytest.raises(ContractError, match="tokenizer: the tokenizer is a WordLevel model"):
        contract(folder).enforce()


@pytest.mark.parametrize("fault", ["names", "width"])
def test_an_importance_matrix_of_another_model_is_refused(
    source: Path, tmp_path: Path, fault: str
) -> None:
    tensors = [
        name for name in types(contract(source)) if name.startswith("blk") and "norm" not in name
    ]
    width = 128 if fault == "width" else 256
    names = [name.replace("blk.1.", "blk.7.") if fault == "names" else name for name in tensors]
    entry = ImportanceEntry(torch.ones(1, width), torch.tensor([3]))
    path = tmp_path / "other.gguf"
    write_imatrix(path, ImportanceMatrix(dict.fromkeys(names, entry), ("text",), 1, 64))
    given = {"calibration": {"source": "x.txt", "imatrix": str(path)}}
    with pytest.raises(BadInputError, match="does not fit this model"):
        contract(source, **given)


@pytest.mark.parametrize(
    ("name", "message"),
    [("model", "does not end in .gguf"), ("model.gguf", "model.gguf exists")],
)
def test_the_output_is_looked_at_before_anything_else(
    source: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"mine")
    with pytest.raises(BadInputError, match=message):
        check(source, gguf_recipe("x.txt"), tmp_path / name)
    assert (tmp_path / "model.gguf").read_bytes() == b"mine"
