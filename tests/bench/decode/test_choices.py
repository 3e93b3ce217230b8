"""What is typed at ``llmopt bench decode``, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmopt.bench.decode.choices import DecodeChoices, decode_options
from llmopt.bench.decode.engines import LLMOPT, plan_entries
from llmopt.bench.decode.workloads import CHECK, MIXED
from llmopt.cli import app
from llmopt.errors import BadInputError


def made(tmp_path: Path, **changes: Any) -> Any:
    return decode_options(DecodeChoices(**changes), tmp_path / "out")


def test_lists_are_read_and_the_plain_settings_are_always_there(tmp_path: Path) -> None:
    options = made(tmp_path, batch="16, 1,4", context="64", weights="int4", kv="int8", peer="none")
    assert options.batches == (1, 4, 16)
    ours = [(entry.weights, entry.kv) for entry in options.entries if entry.engine == LLMOPT]
    assert ours == [("16-bit", "16-bit"), ("16-bit", "int8"), ("int4", "16-bit"), ("int4", "int8")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": "1,zero"}, "no list of positive numbers"),
        ({"batch": "0"}, "no list of positive numbers"),
        ({"context": ""}, "no list of positive numbers"),
        ({"kv": "in8"}, "did you mean 'int8'"),
        ({"weights": "in4"}, "did you mean 'int4'"),
        ({"peer": "vlm"}, "did you mean 'vllm'"),
        ({"gguf": "Q4_K"}, "did you mean 'Q4_K"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"recipe": "int8-rtn"}, "4-bit weights"),
        ({"recipe": "gguf-q4_k_m"}, "4-bit weights"),
        ({"grown": "large"}, "number of parameters"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(BadInputError, match=said):
        made(tmp_path, **changes)


def test_an_output_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(BadInputError, match="out"):
        made(tmp_path)


def test_references_come_first_and_every_engine_is_compared_with_one_of_its_weights() -> None:
    entries = plan_entries(
        ["16-bit", "int4"],
        ["16-bit", "int8"],
        ["transformers", "llama.cpp", "vllm"],
        ["BF16", "Q4_0"],
    )
    assert [entry.weights for entry in entries[:2]] == ["16-bit", "int4"]
    assert all(entry.reference is None for entry in entries[:2])
    compared = {(entry.name, entry.weights): entry.reference for entry in entries[2:]}
    assert compared["llama.cpp", "BF16"] == "16-bit"
    assert compared["llama.cpp", "Q4_0"] is None
    assert compared["vllm", "int4"] == compared[LLMOPT, "int4"] == "int4"
    caches = [entry.kv for entry in entries if entry.engine == "llama.cpp"]
    assert caches == ["16-bit", "int8", "16-bit"]


def test_sequential_generate_runs_mixed_requests_alone_and_everyone_the_check() -> None:
    entries = plan_entries(["16-bit"], ["16-bit"], ["transformers"], [])
    runs = {
        entry.variant or LLMOPT: [entry.runs(name) for name in (CHECK, "4x128", MIXED)]
        for entry in entries
    }
    assert runs == {
        "dynamic": [True, True, True],
        "llmopt": [True, True, True],
        "static": [True, True, False],
        "sequential": [True, False, True],
        "continuous": [True, True, True],
    }
    (reference, _) = plan_entries(["16-bit"], ["16-bit"], [], [])
    assert not reference.runs("4x128") and reference.runs(CHECK)


def test_the_command_line_grows_a_model(tmp_path: Path) -> None:
    from llmopt.demo.paths import demo_model_path

    output = tmp_path / "grown"
    arguments = ["bench", "grow", str(demo_model_path()), "-o", str(output), "--parameters", "14M"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "16 blocks, 1 x as wide" in result.output
    assert (output / "model.safetensors.index.json").is_file()
