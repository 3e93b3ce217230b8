"""Prompts as users give them, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int]


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of prompts.

    Raises:
        BadInputError: none at all, or something else.
    """
    prompts = _plain(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise _no_prompt("prompts", prompts)
    listed = [_plain(prompt) for prompt in prompts]
    if not listed:
        raise BadInputError("there is no prompt: the list is empty", "give at least one prompt")
    return [listed] if isinstance(listed[0], int) else listed


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int, where: str
) -> tuple[int, ...]:
    """The token ids of a prompt; a text's with what the tokenizer puts around it.

    Raises:
        BadInputError: something else, an empty prompt, a text without a tokenizer, or ids that the
            model lacks.
    """
    prompt = _plain(prompt)
    if not isinstance(prompt, str | Sequence):
        raise _no_prompt(where, prompt)
    if not len(prompt):
        raise BadInputError(
            f"{where} is empty",
            "give some text, or the id of the beginning-of-sequence token to start from nothing",
        )
    token_ids: Sequence[int]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise BadInputError(
                f"{where} is text, but the model has no tokenizer",
                "give Engine(tokenizer=...), or prompts as lists of token ids",
            )
        token_ids = tokenizer(prompt, verbose=False)["input_ids"]
    else:
        token_ids = prompt
    for place, token in enumerate(token_ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise BadInputError(
                f"{where} holds {token!r} at place {place}",
                "give a prompt as text or as a list of token ids",
            )
        if not 0 <= token < vocabulary_size:
            raise BadInputError(
                f"{where} holds token {token} at place {place}; the model knows 0 to "
                f"{vocabulary_size - 1}",
                "encode the prompt by the model's own tokenizer",
            )
    if not token_ids:
        raise BadInputError(
            f"{where} has no tokens: its text is nothing to the tokenizer", "give some text"
        )
    return tuple(token_ids)


def _no_prompt(where: str, value: object) -> BadInputError:
    return BadInputError(
        f"{where} is {value!r}, a {type(value).__name__}",
        "give a prompt as text or as a list of token ids, or a list of prompts",
    )


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value
