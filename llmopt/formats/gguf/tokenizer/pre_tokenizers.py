r"""Which of llama.cpp's pre-tokenizers cuts a text as a tokenizer's own definition does.

A definition is brought into a canonical form, one text for each step that cuts:

- an expression: ``Split`` that isolates its matches; ``Digits`` (``\p{N}`` or ``\p{N}+``);
  ``ByteLevel`` with ``use_regex``, which is GPT-2's;
- ``punctuation BEHAVIOR``: ``Punctuation``, whose set of characters no expression names.

``pre_tokenizers.yaml`` says which form llama.cpp has a name for. A form that is not there may still
be one of llama.cpp's in other words. Either way nothing is believed that is not proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import regex
import yaml

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.definition import Step
from llmopt.formats.gguf.tokenizer.engine import compile_splits

GPT2_EXPRESSION = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, eq=False)
class PreTokenizer:
    """A row of the table.

    Attributes:
        name: ``tokenizer.ggml.pre``.
        ignore_merges: whether a word that is a token is taken whole.
        chain: the expressions by which llama.cpp cuts a text.
        definitions: canonical forms that it is known to stand for.
    """

    name: str
    ignore_merges: bool
    chain: tuple[regex.Pattern[str], ...]
    definitions: tuple[tuple[str, ...], ...]


@cache
def known_pre_tokenizers() -> tuple[PreTokenizer, ...]:
    """The rows of ``pre_tokenizers.yaml``, in their order."""
    text = resources.files(__package__).joinpath("pre_tokenizers.yaml").read_text("utf-8")
    return tuple(
        PreTokenizer(
            row["name"],
            row["ignore_merges"],
            compile_splits(row["splits"]),
            tuple(tuple(definition) for definition in row["definitions"]),
        )
        for row in yaml.safe_load(text)["pre_tokenizers"]
    )


def canonical_form(steps: Sequence[Step]) -> tuple[str, ...]:
    """The steps of a byte-level pre-tokenizer that cut a text, each as one text.

    Raises:
        BadInputError: a step that llama.cpp has nothing like.
    """
    form: list[str] = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise BadInputError(
                    "the tokenizer puts a space before every text (ByteLevel, add_prefix_space), "
                    "which llama.cpp does not do for byte-level BPE",
                    "no GGUF file can tokenize as this model does; quantize to another format",
                )
            form += [GPT2_EXPRESSION] if step.get("use_regex", True) else []
        elif kind == "Split":
            form.append(_expression(step))
        elif kind == "Digits":
            form.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Punctuation":
            form.append(f"punctuation {step.get('behavior', 'Isolated')}")
        else:
            raise BadInputError(
                f"the tokenizer's pre-tokenizer {kind} has nothing like it in llama.cpp",
                "no GGUF file can tokenize as this model does; quantize to another format",
            )
    return tuple(form)


def _expression(step: Step) -> str:
    pattern, behavior, invert = step["pattern"], step["behavior"], bool(step.get("invert"))
    text: str = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
    if behavior == "Isolated" or (behavior == "Removed" and invert):
        return text  # matches are words; the latter drops what lies between, where anything does
    return f"{behavior}{' inverted' if invert else ''} {text}"
