"""Holds what llama.cpp would make of texts against what the tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.candidate import Candidate
from llmopt.formats.gguf.tokenizer.definition import TokenizerDefinition
from llmopt.formats.gguf.tokenizer.probes import DECOMPOSED_LINES, LINES, SPACED_LINES

_MOST_TOKENS = 6000  # whose own text is tried
_MOST_ADDED = 40


def prove(definition: TokenizerDefinition, candidate: Candidate) -> tuple[str, ...]:
    """Compare the tokenizer with llama.cpp's behaviour on probe texts.

    Texts as people write them, and the texts of thousands of its own tokens, must come out alike.
    Three kinds of text are spoken of instead of refused, since llama.cpp can do no better and plain
    text is as it should be: what a normalizer would compose (NFC), text that begins with white
    space where a space is put before texts, and text beside special tokens.

    Args:
        definition: the tokenizer.
        candidate: what would be written.

    Returns:
        A note for each of the three kinds that differs.

    Raises:
        BadInputError: with the first text that differs.
    """
    step = max(1, len(candidate.texts) // _MOST_TOKENS)
    plain = [*LINES, *SPACED_LINES, *candidate.texts[::step]]
    spaced = [text for text in plain if text[:1].isspace()] if candidate.space_prefix else []
    strict = [text for text in plain if not (candidate.space_prefix and text[:1].isspace())]
    strict += [text.lstrip() for text in spaced]  # the space before a text makes them whole again
    strict += [] if candidate.composes else DECOMPOSED_LINES
    different = first_difference(definition, candidate, strict)
    if different is not None:
        raise BadInputError(
            f"llama.cpp would not tokenize as this tokenizer does: on {different!r}\n"
            + _shown(definition, candidate, different),
            "no GGUF file can tokenize as this model does; quantize to another format",
        )
    kinds: dict[str, Sequence[str]] = {
        "text that begins with white space": spaced,
        "text that is not in composed form (NFC), for it does not compose characters,": (
            DECOMPOSED_LINES
        ),
        "text beside special tokens": _beside([token.content for token in definition.added]),
    }
    found = {kind: first_difference(definition, candidate, texts) for kind, texts in kinds.items()}
    return tuple(
        f"llama.cpp tokenizes {kind} in another way, for example {text!r}\n"
        + _shown(definition, candidate, text)
        for kind, text in found.items()
        if text is not None
    )


def first_difference(
    definition: TokenizerDefinition, candidate: Candidate, texts: Iterable[str]
) -> str | None:
    """The first text that llama.cpp would tokenize in another way."""
    return next(
        (text for text in texts if definition.encode(text) != candidate.engine.encode(text)), None
    )


def _beside(added: Sequence[str]) -> list[str]:
    """Texts with special tokens in them; of many tokens, the first and the last."""
    some = added if len(added) <= _MOST_ADDED else [*added[:20], *added[-20:]]
    return [f"Hello {token} world, {token}this too{token}" for token in some]


def _shown(definition: TokenizerDefinition, candidate: Candidate, text: str) -> str:
    name = candidate.vocabulary.texts
    own = [name[index] for index in definition.encode(text)]
    theirs = [name[index] for index in candidate.engine.encode(text)]
    pairs = zip(own, theirs, strict=False)
    same = next(
        (place for place, (left, right) in enumerate(pairs) if left != right),
        min(len(own), len(theirs)),
    )
    start = max(0, same - 2)
    return (
        f"    this tokenizer: {' · '.join(own[start : same + 6])}\n"
        f"    llama.cpp:      {' · '.join(theirs[start : same + 6])}"
    )
