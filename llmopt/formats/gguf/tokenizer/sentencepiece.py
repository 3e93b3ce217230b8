"""BPE over characters with byte fallback (Llama 2, Mistral, Phi-3, Gemma) as llama.cpp's ``llama``.

These tokenizers were SentencePiece models; ``tokenizer.json`` has their scores no more, but the
order of its merges follows from them, so scores that give the same order can be had back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.candidate import PREFIX, Candidate, check_bpe, token_values
from llmopt.formats.gguf.tokenizer.definition import Step, TokenizerDefinition
from llmopt.formats.gguf.tokenizer.engine import SPACE, Engine, sentencepiece_bpe
from llmopt.formats.gguf.tokenizer.vocabulary import (
    TokenType,
    Vocabulary,
    build_vocabulary,
    first_missing_byte,
)
from llmopt.formats.gguf.values import boolean, float32s


def sentencepiece(definition: TokenizerDefinition, size: int) -> Candidate:
    """Everything that llama.cpp needs for such a tokenizer.

    Args:
        definition: the tokenizer.
        size: rows of the embedding.

    Raises:
        BadInputError: byte tokens are missing, or the tokenizer does to texts what llama.cpp
            does not.
    """
    check_bpe(definition)
    if definition.model.get("ignore_merges"):
        raise BadInputError(
            "the tokenizer takes words that are tokens whole (ignore_merges), which llama.cpp does "
            "not do for tokenizers with byte fallback",
            "no GGUF file can tokenize as this model does; quantize to another format",
        )
    vocabulary = build_vocabulary(definition, size, byte_tokens=True)
    missing = first_missing_byte(vocabulary, [f"<0x{byte:02X}>" for byte in range(256)])
    if missing is not None:
        raise BadInputError(
            f"the tokenizer falls back to bytes but has no token {missing}",
            "add the missing byte tokens to tokenizer.json",
        )
    prefix = space_prefix(definition.normalizers, definition.pre_tokenizers)
    scores = scores_of_merges(definition, vocabulary)
    values = token_values("llama", "default", vocabulary)
    values[f"{PREFIX}scores"] = float32s(scores)
    values[f"{PREFIX}add_space_prefix"] = boolean(prefix)
    engine = Engine.of(vocabulary, sentencepiece_bpe(vocabulary, scores), space_prefix=prefix)
    texts = [
        vocabulary.texts[index].replace(SPACE, " ")
        for index in vocabulary.of_type(TokenType.NORMAL)
    ]
    return Candidate(
        values=values,
        vocabulary=vocabulary,
        engine=engine,
        texts=(*texts, *_unmerged_texts(definition, vocabulary)),
        composes=any(step["type"] == "NFC" for step in definition.normalizers),
        space_prefix=prefix,
    )


def scores_of_merges(definition: TokenizerDefinition, vocabulary: Vocabulary) -> list[float]:
    """A score for each token that makes llama.cpp join in the order of the merges.

    What the merge of rank r makes has the score -r, as SentencePiece has it for BPE; what no merge
    makes comes last, for llama.cpp joins whatever spells a token.
    """
    ids = vocabulary.ids
    lowest = float(-len(definition.merges) - 1)
    scores = [
        lowest if kind in (TokenType.NORMAL, TokenType.USER_DEFINED) else 0.0
        for kind in vocabulary.types
    ]
    for rank, (left, right) in reversed(list(enumerate(definition.merges))):
        scores[ids[left + right]] = float(-rank)
    return scores


def _unmerged_texts(definition: TokenizerDefinition, vocabulary: Vocabulary) -> list[str]:
    """Texts of tokens that llama.cpp could join from two that the tokenizer does not join.

    These are where the two may part.
    """
    merges = set(definition.merges)
    ids = vocabulary.ids
    found: list[str] = []
    for index in vocabulary.of_type(TokenType.NORMAL):
        text = vocabulary.texts[index]
        pairs = ((text[:place], text[place:]) for place in range(1, len(text)))
        if any(pair[0] in ids and pair[1] in ids and pair not in merges for pair in pairs):
            found.append(text.replace(SPACE, " "))
    return found


def space_prefix(normalizers: Iterable[Step], pre_tokenizers: Iterable[Step]) -> bool:
    """Whether a space is put before a text.

    Raises:
        BadInputError: a step that llama.cpp knows nothing of, or spaces are not made ``▁``.
    """
    prefix = escapes = False
    for step in normalizers:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Replace" and _replaces_spaces(step):
            escapes = True
        elif step["type"] != "NFC":  # what that changes is compared like any other text
            raise _unknown_step("normalizer", step)
    for step in pre_tokenizers:
        if step["type"] == "Metaspace" and step["replacement"] == SPACE:
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
            escapes = True
        elif not (escapes and step["type"] == "Split" and step["pattern"] == {"String": " "}):
            raise _unknown_step("pre-tokenizer", step)
    if not escapes:
        raise BadInputError(
            "the tokenizer has byte fallback but does not write spaces as ▁, as llama.cpp does",
            "no GGUF file can tokenize as this model does; quantize to another format",
        )
    return prefix


def _replaces_spaces(step: Step) -> bool:
    pattern: Mapping[str, str] = step["pattern"]
    return pattern.get("String") == " " and step["content"] == SPACE


def _unknown_step(kind: str, step: Step) -> BadInputError:
    shown = {key: value for key, value in step.items() if key != "precompiled_charsmap"}
    return BadInputError(
        f"the tokenizer's {kind} {shown} has nothing like it in llama.cpp",
        "no GGUF file can tokenize as this model does; quantize to another format",
    )
