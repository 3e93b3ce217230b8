"""Text of a growing sequence of tokens, in pieces that are never taken back.

A token's text depends on its neighbours: a character's bytes may be spread over four tokens, and
decoders drop the space before the first word. So a window of the latest tokens is decoded anew
with each token, and what has become of it since is the next piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character, or not yet one."""

_LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, hence tokens that may be wanting to complete one."""

_CONTEXT = 8
"""Tokens before a window's new ones, so that the first of those is not taken for a text's first."""

_LONGEST_CONTEXT = 32
_LONGEST_WINDOW = 32


class Decoder(Protocol):
    """What of a transformers tokenizer is used here."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """The text of some tokens."""


class Detokenizer:
    """The text that generated tokens add to a prompt.

    The pieces of :meth:`push` and :meth:`finish` joined are what decoding prompt and generated
    tokens together has beyond the prompt's text, spaces as the model meant them, special tokens
    left out. Bytes that form no character become U+FFFD once nothing can complete them.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt; where it ends inside a character, the character counts as generated.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._context(prompt_ids)
        before = self._decode(self._window)
        self._num_emitted = len(before.rstrip(REPLACEMENT))  # of the window's characters
        self._num_pending = 0  # tokens since the last that completed a character

    def push(self, token_ids: Sequence[int]) -> str:
        """The piece that these tokens complete; empty inside a character."""
        self._window += token_ids
        self._num_pending += len(token_ids)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and self._num_pending < _LONGEST_CHARACTER:
            return ""
        if text.endswith(REPLACEMENT):
            stable = len(text) - 1  # only the last can still become a character
        else:
            stable, self._num_pending = len(text), 0
        piece = text[self._num_emitted : stable]
        self._num_emitted = max(stable, self._num_emitted)
        if len(self._window) > _LONGEST_WINDOW:
            self._slide(text)
        return piece

    def finish(self) -> str:
        """What was held back: the bytes of a character that will not be completed."""
        return self._decode(self._window)[self._num_emitted :]

    def _slide(self, text: str) -> None:
        """Forget the window's older tokens where its later ones alone decode to the same text."""
        for keep in range(_CONTEXT, 2 * _CONTEXT):
            tail = self._decode(self._window[-keep:])
            forgotten = len(text) - len(tail)
            if not tail or not text.endswith(tail) or forgotten > self._num_emitted:
                continue
            # Bytes at the front may be the end of a character that is cut in two.
            if tail.startswith(REPLACEMENT) and (self._decode(self._window[:-keep]) + tail != text):
                continue
            self._window = self._window[-keep:]
            self._num_emitted -= forgotten
            return

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The end of the prompt: some text, and no half character at its front."""
        context: list[int] = []
        for length in range(_CONTEXT, _LONGEST_CONTEXT + 1):
            context = list(prompt_ids[-length:])
            text = self._decode(context)
            if length >= len(prompt_ids) or (text and not text.startswith(REPLACEMENT)):
                break
        return context

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
