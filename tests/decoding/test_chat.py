from __future__ import annotations

import pytest
from support.engines import tiny_engine, tiny_tokenizer

from llmopt.decoding import Engine
from llmopt.decoding.chat import Chat
from llmopt.errors import BadInputError


def test_an_answer_cut_short_stays_in_the_history() -> None:
    engine = tiny_engine()
    talk = Chat(engine)
    pieces = talk.ask("kato", ignore_eos=True)
    said = next(pieces) + next(pieces)
    pieces.close()
    assert [message["content"] for message in talk.messages] == ["kato", said]
    assert not engine.has_work and engine.num_free_pages == {"full": 64}
    talk.forget()
    assert talk.messages == []


def test_an_answer_may_fill_the_context() -> None:
    engine = tiny_engine(max_context=48)
    list(Chat(engine).ask("kato", ignore_eos=True))
    with pytest.raises(BadInputError, match="context of 48"):
        list(Chat(engine).ask("kato " * 60))


def test_without_a_template_there_is_no_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    monkeypatch.setattr(tiny_tokenizer(), "chat_template", None)
    with pytest.raises(BadInputError, match="chat template"):
        Chat(engine)


def test_what_the_template_refuses_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine: Engine = tiny_engine()
    template = "{{ raise_exception('no system message') }}"
    monkeypatch.setattr(tiny_tokenizer(), "chat_template", template)
    with pytest.raises(BadInputError, match="no system message"):
        list(Chat(engine, system="lavi").ask("kato"))
