"""A conversation with a model: its chat template, its history, one answer at a time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from llmopt.decoding.engine import Engine
from llmopt.errors import BadInputError

LONGEST_ANSWER = 1024


class Chat:
    """What was said so far, and the next answer to it.

    Turns that were computed before are taken from the engine's cache.

    Args:
        engine: with a tokenizer that has a chat template.
        system: the system's message, if any.

    Attributes:
        messages: ``{"role": ..., "content": ...}`` of every turn.

    Raises:
        BadInputError: no tokenizer or no chat template.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        if engine.tokenizer is None or not engine.tokenizer.chat_template:
            raise BadInputError(
                "the model has no chat template",
                "add its chat_template.jinja to the directory, or use llmopt generate for a model "
                "that is not made for conversations",
            )
        self._engine = engine
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, question: str, **options: Any) -> Generator[str, None, None]:
        """Ask, and give the answer in pieces; closing the generator cuts the answer short.

        The turn becomes part of the history with the first piece of its answer.

        Args:
            question: the user's turn.
            options: of :meth:`Engine.generate`; ``max_new_tokens`` is what is left of the context,
                at most 1024, if not given.

        Raises:
            BadInputError: the template refuses the turn, or the conversation has filled the
                context.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        token_ids = self._render(asked)
        if options.get("max_new_tokens") is None:
            room = self._engine.max_context - len(token_ids)
            options["max_new_tokens"] = max(1, min(room, LONGEST_ANSWER))
        answer = ""
        deltas = self._engine.iterate(token_ids, **options)
        try:
            for delta in deltas:
                answer += delta.text
                self.messages = [*asked, {"role": "assistant", "content": answer}]
                yield delta.text
        finally:
            deltas.close()

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        import jinja2

        tokenizer = self._engine.tokenizer
        assert tokenizer is not None
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise BadInputError(
                f"the chat template refuses this conversation ({error})",
                "some templates take no system message: leave it out",
            ) from error
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
