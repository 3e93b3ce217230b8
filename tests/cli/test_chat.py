from __future__ import annotations

import pytest
from support.engines import tiny_engine
from typer.testing import CliRunner

from llmopt import decoding
from llmopt.cli import app


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "Engine", lambda model, **_: tiny_engine(), raising=False)


def chat(lines: str, *options: str) -> str:
    words = ["chat", "MODEL", "--max-new-tokens", "5", *options]
    result = CliRunner().invoke(app, words, input=lines)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer_to(text: str) -> str:
    ids = tiny_engine().tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    return str(tiny_engine().generate(ids, max_new_tokens=5)[0].text)


def test_turns_are_answered_with_what_was_said_before() -> None:
    first = answer_to("user:\nkato\n\nassistant:\n")
    second = answer_to(f"user:\nkato\n\nassistant:\n{first}\n\nuser:\nmire\n\nassistant:\n")
    assert chat("kato\nmire\n") == f"> {first}\n> {second}\n> \n"


def test_new_forgets_and_exit_ends() -> None:
    first, other = (answer_to(f"user:\n{word}\n\nassistant:\n") for word in ("kato", "mire"))
    assert chat("kato\n/new\nmire\n/exit\nsuno\n") == f"> {first}\n> > {other}\n> "


def test_a_system_message_comes_first() -> None:
    expected = answer_to("system:\nlavi\n\nuser:\nkato\n\nassistant:\n")
    assert chat("kato\n", "--system", "lavi") == f"> {expected}\n> \n"


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was() -> None:
    first = answer_to("user:\nkato\n\nassistant:\n")
    second = answer_to(f"user:\nkato\n\nassistant:\n{first}\n\nuser:\nmire\n\nassistant:\n")
    shown = chat(f"kato\n{'vi do pe ' * 200}\nmire\n")
    assert shown == f"> {first}\n> \n> {second}\n> \n"
