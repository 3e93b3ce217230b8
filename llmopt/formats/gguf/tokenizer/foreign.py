"""A file's tokenizer beside the one that its source asks for: what llama.cpp would do otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.metadata import tokenizer_metadata
from llmopt.formats.gguf.values import PlainValue, TypedValue

_SINGLE = {
    "model": "the kind of tokenizer",
    "pre": "the pre-tokenizer",
    "bos_token_id": "the token that begins a text",
    "eos_token_id": "the token that ends one",
    "add_bos_token": "whether a text begins with it",
    "add_eos_token": "whether a text ends with it",
    "add_space_prefix": "whether a text begins with a space",
}
_LISTS = {"merges": "merges", "scores": "scores of tokens"}
_TOKENS_DIFFER = "llama.cpp may cut texts into other tokens than those that were judged here"


def tokenizer_notes(
    metadata: Mapping[str, PlainValue], source: Path, vocabulary_size: int
) -> tuple[str, ...]:
    """How a file's tokenizer differs from what llmopt would write of the source's.

    The gate gives a file the source's tokens, and so says nothing of the file's own tokenizer.

    Args:
        metadata: of the file.
        source: folder of the checkpoint.
        vocabulary_size: rows of the file's embedding.
    """
    try:
        wanted = tokenizer_metadata(source, vocabulary_size).values
    except BadInputError as error:
        return (f"the file's tokenizer was not compared: {error.what}",)
    return tuple(_differences(metadata, wanted))


def _differences(
    metadata: Mapping[str, PlainValue], wanted: Mapping[str, TypedValue]
) -> Iterator[str]:
    for key, what in _SINGLE.items():
        name = f"tokenizer.ggml.{key}"
        ours, theirs = wanted.get(name), metadata.get(name)
        if ours is not None and theirs != ours.value:
            said = "is not said" if theirs is None else f"is {theirs!r}"
            yield f"{what} ({name}) {said} in the file; the source's is {ours.value!r}: " + (
                _TOKENS_DIFFER
            )
    for key, what in _LISTS.items():
        name = f"tokenizer.ggml.{key}"
        if name in wanted and not _same(wanted[name].value, metadata.get(name)):
            yield f"the {what} ({name}) are not the source's: {_TOKENS_DIFFER}"


def _same(ours: object, theirs: PlainValue | None) -> bool:
    if isinstance(theirs, np.ndarray):
        return np.array_equal(np.asarray(ours, dtype=theirs.dtype), theirs)
    return isinstance(ours, tuple) and ours == theirs
