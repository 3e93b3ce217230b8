from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.engines import tiny_engine
from typer.testing import CliRunner

from llmopt import decoding
from llmopt.cli import app
from llmopt.decoding import Engine
from llmopt.errors import BadInputError


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The options of engines that were opened; all have a tiny model."""
    calls: list[dict[str, object]] = []

    def open_engine(model: Path, **options: object) -> Engine:
        calls.append({"model": model, **options})
        return tiny_engine()

    monkeypatch.setattr(decoding, "Engine", open_engine, raising=False)
    return calls


def test_one_prompt_is_continued_as_it_comes(opened: list[dict[str, object]]) -> None:
    words = ["generate", "MODEL", "kato mire", "--max-new-tokens", "7", "--ignore-eos"]
    result = CliRunner().invoke(app, [*words, "--kv-cache", "int8"])
    (answer,) = tiny_engine().generate("kato mire", max_new_tokens=7, ignore_eos=True)
    assert result.exit_code == 0 and result.stdout == f"{answer.text}\n"
    assert opened[0]["model"] == Path("MODEL") and opened[0]["kv_cache"] == "int8"


def test_several_answers_come_as_lines_of_json(opened: list[dict[str, object]]) -> None:
    drawn = ["--temperature", "1.5", "--seed", "3", "-n", "2", "--top-p", "0.9"]
    words = ["generate", "MODEL", "kato", "mire", "--max-new-tokens", "5", *drawn, "--json"]
    result = CliRunner().invoke(app, words)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = tiny_engine().generate(
        ["kato", "mire"], max_new_tokens=5, temperature=1.5, seed=3, n=2, top_p=0.9
    )
    assert [line["prompt"] for line in lines] == ["kato", "kato", "mire", "mire"]
    assert [line["token_ids"] for line in lines] == [answer.token_ids for answer in expected]
    assert [line["finish_reason"] for line in lines] == [a.finish_reason for a in expected]
    plain = CliRunner().invoke(app, words[:-1])
    assert all(str(answer.text) in plain.stdout for answer in expected)


def test_a_dash_reads_the_prompt(opened: list[dict[str, object]]) -> None:
    words = ["generate", "MODEL", "-", "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(app, words, input="kato mire")
    assert json.loads(result.stdout)["prompt"] == "kato mire"


def test_bad_input_is_an_error(opened: list[dict[str, object]]) -> None:
    result = CliRunner().invoke(app, ["generate", "MODEL", "kato", "--top-p", "0.9"])
    assert isinstance(result.exception, BadInputError)
