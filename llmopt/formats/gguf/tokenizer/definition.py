"""A tokenizer's own definition: what ``tokenizer.json`` says, as ``tokenizers`` parses it.

The format is that of huggingface/tokenizers: a model (BPE, Unigram, ...) between a normalizer and a
pre-tokenizer before it and a decoder after it, and added tokens that are cut out of the text first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Step = Mapping[str, Any]
"""One normalizer or pre-tokenizer, as the file has it."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in the text before the model sees it.

    Attributes:
        id: its row in the embedding.
        content: its text.
        special: whether it stands for something other than text.
        normalized: whether it is looked for in the normalized text.
        strips: whether it swallows white space beside it, or matches whole words only.
    """

    id: int
    content: str
    special: bool
    normalized: bool
    strips: bool


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerDefinition:
    """A tokenizer, taken apart.

    Attributes:
        model: the model's own settings (``type``, ``unk_token``, ``byte_fallback``, ...).
        pieces: each of the model's tokens and its id, added tokens apart.
        merges: of a BPE model, the pairs that it joins, best first.
        added: in order of their ids.
        normalizers: in the order they are applied, sequences unfolded.
        pre_tokenizers: likewise.
        tokenizer: what runs it.
    """

    model: Mapping[str, Any]
    pieces: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    added: tuple[AddedToken, ...]
    normalizers: tuple[Step, ...]
    pre_tokenizers: tuple[Step, ...]
    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, added tokens recognised in it, nothing put around it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def load_tokenizers(folder: Path) -> tuple[PreTrainedTokenizerBase, TokenizerDefinition | None]:
    """The tokenizer that evaluation uses, and the definition of the folder's ``tokenizer.json``.

    Raises:
        BadInputError: neither can be read, or the class has no definition to read.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        file = folder / "tokenizer.json"
        of_file = define(Tokenizer.from_file(str(file))) if file.is_file() else None
    except Exception as error:  # both libraries raise whatever their parsers raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInputError(
            f"the tokenizer of {folder} could not be loaded: {first_line}",
            "check the tokenizer files; a tokenizer that needs its own Python code is not run",
        ) from error
    return loaded, of_file


def definition_of_class(loaded: PreTrainedTokenizerBase) -> TokenizerDefinition:
    """The definition that a loaded tokenizer really runs.

    Raises:
        BadInputError: it is not one of the ``tokenizers`` library.
    """
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise BadInputError(
            f"the tokenizer class {type(loaded).__name__} is not built on the tokenizers library, "
            "so there is no definition to write into a GGUF file",
            "convert the tokenizer to a tokenizer.json first",
        )
    return define(backend)


def define(tokenizer: Tokenizer) -> TokenizerDefinition:
    """Take a tokenizer apart."""
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    vocabulary = model.get("vocab") or {}
    if not isinstance(vocabulary, dict):  # Unigram: a list of (text, score)
        vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
    return TokenizerDefinition(
        model=model,
        pieces=vocabulary,
        merges=tuple(_pair(pair) for pair in model.get("merges") or ()),
        added=tuple(_added_token(entry) for entry in content.get("added_tokens") or ()),
        normalizers=_unfold(content.get("normalizer"), "normalizers"),
        pre_tokenizers=_unfold(content.get("pre_tokenizer"), "pretokenizers"),
        tokenizer=tokenizer,
    )


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        id=entry["id"],
        content=entry["content"],
        special=bool(entry.get("special")),
        normalized=bool(entry.get("normalized")),
        strips=any(bool(entry.get(key)) for key in ("lstrip", "rstrip", "single_word")),
    )


def _unfold(step: Step | None, key: str) -> tuple[Step, ...]:
    if step is None:
        return ()
    if step["type"] == "Sequence":
        parts: Sequence[Step] = step[key]
        return tuple(inner for part in parts for inner in _unfold(part, key))
    return (step,)


def _pair(pair: str | Sequence[str]) -> tuple[str, str]:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left, right
