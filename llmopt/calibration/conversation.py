"""A row of a data set as one text: bare text, a conversation, or a pair of turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmopt.errors import BadInputError

ROW_KINDS = (
    "rows with `text`, `messages` [{role, content}], `conversations` [{from, value}], "
    "`prompt` + `completion`, or `instruction` (+ `input`) + `output`"
)

ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "model": "assistant", "assistant": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip
"""Speaker in ``conversations`` rows -> role that chat templates know."""

Message = dict[str, str]


class ChatTokenizer(Protocol):
    """What of a transformers tokenizer is used here."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = True) -> Any:
        """Render a conversation."""


def row_text(row: Mapping[str, object], where: str, tokenizer: ChatTokenizer | None) -> str:
    """The text of one row; conversations and pairs rendered by the chat template.

    Args:
        row: column name -> value.
        where: file and line, or data set and row, for messages.
        tokenizer: renders conversations.

    Raises:
        BadInputError: no usable column, a value of the wrong type, or no chat template.
    """
    if "text" in row:
        return _string(row["text"], "text", where)
    for column, role_key, content_key in (
        ("messages", "role", "content"),
        ("conversations", "from", "value"),
    ):
        if column in row:
            turns = _turns(row[column], column, role_key, content_key, where)
            return _render(turns, where, tokenizer)
    for asked, answered in (("prompt", "completion"), ("instruction", "output")):
        if asked in row and answered in row:
            question = _string(row[asked], asked, where)
            if asked == "instruction" and row.get("input"):
                question += "\n\n" + _string(row["input"], "input", where)
            answer = _string(row[answered], answered, where)
            return _render([_message("user", question), _message("assistant", answer)], where,
                           tokenizer)  # fmt: skip
    raise BadInputError(
        f"{where} has no usable column (there are: {', '.join(map(str, row)) or 'none'})",
        f"use {ROW_KINDS}",
    )


def _turns(
    value: object, column: str, role_key: str, content_key: str, where: str
) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadInputError(f"{where}: `{column}` is not a list of turns", f"use {ROW_KINDS}")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise BadInputError(
                f"{where}: a turn of `{column}` lacks `{role_key}` or `{content_key}`",
                f"use {ROW_KINDS}",
            )
        speaker = _string(turn[role_key], role_key, where)
        if column == "conversations" and speaker not in ROLES:
            raise BadInputError(
                f"{where}: unknown speaker {speaker!r}", f"use one of {', '.join(ROLES)}"
            )
        role = ROLES[speaker] if column == "conversations" else speaker
        turns.append(_message(role, _string(turn[content_key], content_key, where)))
    return turns


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _string(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInputError(
            f"{where}: `{column}` is {type(value).__name__}, not text", f"use {ROW_KINDS}"
        )
    return value


def _render(turns: list[Message], where: str, tokenizer: ChatTokenizer | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise BadInputError(
            f"{where} is a conversation, but the model's tokenizer has no chat template",
            "add the model's chat_template.jinja to its directory, or give text with a `text` "
            "column",
        )
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except jinja2.TemplateError as error:
        raise BadInputError(
            f"{where}: the chat template refuses this conversation ({error})",
            "correct the order of roles in this row, or leave the row out",
        ) from error
