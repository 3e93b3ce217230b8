"""Byte-level BPE (GPT-2's and its heirs') as llama.cpp's ``gpt2`` model."""

from __future__ import annotations

from collections.abc import Sequence

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.candidate import PREFIX, Candidate, check_bpe, token_values
from llmopt.formats.gguf.tokenizer.definition import TokenizerDefinition
from llmopt.formats.gguf.tokenizer.engine import (
    Engine,
    byte_characters,
    byte_level_bpe,
    join_symbols,
    split_words,
    to_byte_characters,
)
from llmopt.formats.gguf.tokenizer.pre_tokenizers import (
    PreTokenizer,
    canonical_form,
    known_pre_tokenizers,
)
from llmopt.formats.gguf.tokenizer.probes import (
    DECOMPOSED_LINES,
    LINES,
    SPACED_LINES,
    class_strings,
)
from llmopt.formats.gguf.tokenizer.vocabulary import (
    TokenType,
    Vocabulary,
    build_vocabulary,
    first_missing_byte,
)
from llmopt.formats.gguf.values import strings


def byte_level(definition: TokenizerDefinition, size: int) -> Candidate:
    """Everything that llama.cpp needs for a byte-level BPE tokenizer.

    Args:
        definition: the tokenizer.
        size: rows of the embedding.

    Raises:
        BadInputError: llama.cpp has no pre-tokenizer that cuts text as this one, or lacks
            something else that the tokenizer does.
    """
    check_bpe(definition)
    composes = _composes(definition)
    vocabulary = build_vocabulary(definition, size, byte_tokens=False)
    missing = first_missing_byte(vocabulary, byte_characters())
    if missing is not None:
        raise BadInputError(
            f"the tokenizer has no token for the byte {byte_characters().index(missing)} "
            f"({missing!r}); llama.cpp would leave such bytes out of the text",
            "add the missing byte tokens to tokenizer.json",
        )
    merges = definition.merges
    chosen, notes = recognise(definition, vocabulary, merges)
    tokenize = byte_level_bpe(vocabulary, merges, chosen.chain, ignore_merges=chosen.ignore_merges)
    values = token_values("gpt2", chosen.name, vocabulary)
    # A file cannot hold an array without elements; a pair that spells no token never joins.
    values[f"{PREFIX}merges"] = strings([f"{left} {right}" for left, right in merges] or ["! !"])
    return Candidate(
        values=values,
        vocabulary=vocabulary,
        engine=Engine.of(vocabulary, tokenize),
        texts=_token_texts(vocabulary),
        composes=composes,
        space_prefix=False,
        notes=notes,
    )


def recognise(
    definition: TokenizerDefinition, vocabulary: Vocabulary, merges: Sequence[tuple[str, str]]
) -> tuple[PreTokenizer, tuple[str, ...]]:
    """The row of the table that cuts text as the tokenizer does, and what to say of it.

    Raises:
        BadInputError: there is none; says which comes nearest and where it differs first.
    """
    form = canonical_form(definition.pre_tokenizers)
    named = [row for row in known_pre_tokenizers() if form in row.definitions]
    others = [row for row in known_pre_tokenizers() if form not in row.definitions]
    texts = [*LINES, *SPACED_LINES, *DECOMPOSED_LINES, *class_strings()]
    wanted = [_own_words(definition, text) for text in texts]
    agreeing = [row for row in named if _num_agreeing(row, texts, wanted) == len(texts)]
    notes: tuple[str, ...] = ()
    if not agreeing:
        agreeing = [row for row in others if _num_agreeing(row, texts, wanted) == len(texts)]
        notes = tuple(
            f"the pre-tokenizer's definition is not one of those known for {row.name!r}, but cuts "
            f"{len(texts)} probe texts alike, so {row.name!r} was written"
            for row in agreeing[:1]
        )
    if not agreeing:
        raise _no_equivalent(named or others, texts, wanted, form)
    ignores = bool(definition.model.get("ignore_merges"))
    fitting = [row for row in agreeing if row.ignore_merges == ignores]
    if fitting:
        return fitting[0], notes
    unreachable = first_unreachable(vocabulary, merges)
    if unreachable is not None:
        raise BadInputError(
            f"llama.cpp's pre-tokenizer {agreeing[0].name!r} cuts text as this tokenizer does, but "
            f"{'joins every word' if ignores else 'takes words that are tokens whole'}, which "
            f"differs for the token {unreachable!r} (ignore_merges is {ignores} in tokenizer.json)",
            "no GGUF file can tokenize as this model does; quantize to another format",
        )
    return agreeing[0], notes


def first_unreachable(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]]) -> str | None:
    """The first token that joining its characters does not give: where ``ignore_merges`` tells."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    for index in vocabulary.of_type(TokenType.NORMAL):
        text = vocabulary.texts[index]
        if len(join_symbols(text, lambda left, right: ranks.get((left, right)))) > 1:
            return text
    return None


def _composes(definition: TokenizerDefinition) -> bool:
    for step in definition.normalizers:
        if step["type"] != "NFC":
            raise BadInputError(
                f"the tokenizer rewrites texts ({step['type']}) before it cuts them; llama.cpp "
                "does no such thing for byte-level BPE",
                "no GGUF file can tokenize as this model does; quantize to another format",
            )
    return bool(definition.normalizers)


def _token_texts(vocabulary: Vocabulary) -> tuple[str, ...]:
    byte_of = {char: byte for byte, char in enumerate(byte_characters())}
    texts = []
    for index in vocabulary.of_type(TokenType.NORMAL):
        try:
            texts.append(bytes(byte_of[char] for char in vocabulary.texts[index]).decode())
        except (KeyError, UnicodeDecodeError):
            continue  # a part of a character, or a token that no text becomes
    return tuple(texts)


def _own_words(definition: TokenizerDefinition, text: str) -> list[str]:
    return [word for word, _ in definition.tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _words(row: PreTokenizer, text: str) -> list[str]:
    return [to_byte_characters(word) for word in split_words(text, row.chain)]


def _num_agreeing(row: PreTokenizer, texts: Sequence[str], wanted: Sequence[list[str]]) -> int:
    """How many texts a row cuts as wanted, before the first that it does not."""
    for place, (text, words) in enumerate(zip(texts, wanted, strict=True)):
        if _words(row, text) != words:
            return place
    return len(texts)


def _no_equivalent(
    rows: Sequence[PreTokenizer],
    texts: Sequence[str],
    wanted: Sequence[list[str]],
    form: Sequence[str],
) -> BadInputError:
    nearest = max(rows, key=lambda row: _num_agreeing(row, texts, wanted))
    place = _num_agreeing(nearest, texts, wanted)
    return BadInputError(
        "llama.cpp has no pre-tokenizer that cuts text as this tokenizer does\n"
        f"  its definition: {' | then '.join(form) or 'no cutting at all'}\n"
        f"  nearest in llama.cpp: {nearest.name!r}, which first differs on {texts[place]!r}:\n"
        f"    this tokenizer: {_shown(wanted[place])}\n"
        f"    {nearest.name}: {_shown(_words(nearest, texts[place]))}",
        "no GGUF file can tokenize as this model does, and a wrong pre-tokenizer spoils every "
        "answer silently; quantize to another format",
    )


def _shown(words: Sequence[str]) -> str:
    byte_of = {char: byte for byte, char in enumerate(byte_characters())}
    return " · ".join(
        repr(bytes(byte_of[char] for char in word).decode(errors="replace")) for word in words
    )
