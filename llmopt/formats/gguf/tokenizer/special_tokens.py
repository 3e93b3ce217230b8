"""Which tokens begin and end texts and turns, and what is put around a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.candidate import PREFIX
from llmopt.formats.gguf.tokenizer.vocabulary import TokenType, Vocabulary
from llmopt.formats.gguf.values import TypedValue, boolean, uint32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDS_BY_NAME = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
"""Texts of tokens at which llama.cpp stops whatever the file says."""

FILL_IN_NAMES: Mapping[str, tuple[str, ...]] = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>",
                "▁<PRE>", "<|code_prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>",
                "▁<SUF>", "<|code_suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
                "▁<MID>", "<|code_middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
"""Texts by which the tokens for filling in the middle are known."""

_PLAIN_KEYS = {
    "bos": "bos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # the specification spells it so
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Metadata of special tokens.

    Attributes:
        values: ids and switches.
        notes: what a person should know.
    """

    values: Mapping[str, TypedValue]
    notes: tuple[str, ...]


def special_tokens(
    folder: Path, loaded: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> SpecialTokens:
    """Find the special tokens where the tokenizer and the model's configuration name them.

    Args:
        folder: of the model; its ``generation_config.json`` and ``config.json`` are read.
        loaded: the tokenizer, as evaluation uses it.
        vocabulary: the tokens of the file.

    Raises:
        BadInputError: more than BOS and EOS is put around a text, or no token ends a text.
    """
    before, after = _around(loaded)
    values: dict[str, TypedValue] = {}
    for name, key in _PLAIN_KEYS.items():
        index = getattr(loaded, f"{name}_token_id", None)
        # A class may add tokens of its own, for which the model has no row.
        if index is not None and vocabulary.has(index):
            values[f"{PREFIX}{key}"] = uint32(index)
    if before is not None:
        values[f"{PREFIX}bos_token_id"] = uint32(before)
    ends = [index for index in _ends(folder) if vocabulary.has(index)]
    own = getattr(loaded, "eos_token_id", None)
    own = own if own is not None and vocabulary.has(own) else None
    first = after if after is not None else own if own is not None else next(iter(ends), None)
    notes: list[str] = []
    if first is None:
        first = _stand_in(vocabulary)
        notes.append(
            "neither the tokenizer nor the model's configuration names a token that ends a text; "
            f"llama.cpp must have one, so {vocabulary.texts[first]!r}, which the model does not "
            "use, was named"
        )
    values[f"{PREFIX}eos_token_id"] = uint32(first)
    notes += _name_other_ends(values, ends, first, vocabulary)
    values[f"{PREFIX}add_bos_token"] = boolean(before is not None)
    values[f"{PREFIX}add_eos_token"] = boolean(after is not None)
    ids = vocabulary.ids
    for name, texts in FILL_IN_NAMES.items():
        found = next((ids[text] for text in texts if text in ids), None)
        if found is not None:
            values[f"{PREFIX}{name}_token_id"] = uint32(found)
    return SpecialTokens(values, tuple(notes))


def _around(loaded: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The ids that the tokenizer puts before and after a text."""
    bare: list[int] = loaded(["a"], add_special_tokens=False)["input_ids"][0]
    dressed: list[int] = loaded(["a"], add_special_tokens=True)["input_ids"][0]
    for start in range(len(dressed) - len(bare) + 1):
        before, after = dressed[:start], dressed[start + len(bare) :]
        if dressed[start : start + len(bare)] == bare and max(len(before), len(after)) <= 1:
            return next(iter(before), None), next(iter(after), None)
    raise BadInputError(
        f"the tokenizer makes {dressed} of a text that is {bare} by itself; llama.cpp can put one "
        "token before a text and one after it, no more",
        "no GGUF file can tokenize as this model does; quantize to another format",
    )


def _ends(folder: Path) -> list[int]:
    """All tokens that end generation, by the model's configuration."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        content: Any = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        found = content.get("eos_token_id")
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def _name_other_ends(
    values: dict[str, TypedValue], ends: list[int], first: int, vocabulary: Vocabulary
) -> list[str]:
    """Name further tokens that end a turn: llama.cpp has two places, and knows some by name."""
    places = [f"{PREFIX}eot_token_id", f"{PREFIX}eom_token_id"]
    others = [index for index in dict.fromkeys(ends) if index != first]
    unnamed = [index for index in others if vocabulary.texts[index] not in ENDS_BY_NAME]
    for key, index in zip(places, unnamed, strict=False):
        values[key] = uint32(index)
    return [
        f"the model also stops at {vocabulary.texts[index]!r}; llama.cpp has no place to say so"
        for index in unnamed[len(places) :]
    ]


def _stand_in(vocabulary: Vocabulary) -> int:
    """A token that is never generated; without one, llama.cpp stops at whatever token 11 is."""
    unused = vocabulary.of_type(TokenType.UNUSED, TokenType.UNKNOWN)
    if unused:
        return unused[0]
    raise BadInputError(
        "neither the tokenizer nor the model's configuration names a token that ends a text; "
        "llama.cpp would take token 11 or 2 for it",
        "name eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
    )
