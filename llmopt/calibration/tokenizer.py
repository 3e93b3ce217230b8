"""The model's tokenizer, and what it puts around one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TEXT = (
    "Hello  World, it's 12345.678 o'clock!\n\n\tdef f(x): return x**2  # naïve café cafe\u0301\n"
    "“quotes” — dashes… 你好，世界 Привет ١٢٣ ﬁne ½ 🙂🙂   \r\nDON'T 2024-11-21 http://a.b/c?d=e"
)
"""Numbers, runs of spaces, contractions, decomposed accents, other scripts: where pre-tokenizers
differ."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                 "tekken.json")  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer and what a person should know about it.

    Attributes:
        tokenizer: as transformers (and so vLLM) loads it.
        disagreement: how it differs from the directory's ``tokenizer.json`` on a probe text (a
            tokenizer class may put its own pre-tokenizer in place of the file's); ``None`` when
            they agree or there is no such file.
    """

    tokenizer: PreTrainedTokenizerBase
    disagreement: str | None


def load_tokenizer(path: Path) -> LoadedTokenizer:
    """Load the tokenizer of a model directory, from local files and without remote code.

    Raises:
        BadInputError: no tokenizer files, unreadable ones, or one that needs remote code.
    """
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise BadInputError(
            f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}: none is there)",
            "copy the tokenizer files of the model into its directory",
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers and transformers raise whatever their parsers raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInputError(
            f"the tokenizer of {path} could not be loaded: {first_line}",
            "check the tokenizer files; a tokenizer that needs its own Python code is not run",
        ) from error
    return LoadedTokenizer(tokenizer, _disagreement(tokenizer, path / "tokenizer.json"))


def _disagreement(tokenizer: PreTrainedTokenizerBase, file: Path) -> str | None:
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    by_class = encode([PROBE_TEXT], tokenizer)[0]
    by_file: list[int] = (
        Tokenizer.from_file(str(file)).encode(PROBE_TEXT, add_special_tokens=False).ids
    )
    if by_class == by_file:
        return None
    return (
        f"{type(tokenizer).__name__} gives {len(by_class)} tokens for the probe text, its own "
        f"tokenizer.json {len(by_file)}: the class puts another pre-tokenizer in place of the "
        "file's; calibration and evaluation use the class's, as transformers and vLLM do"
    )


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, nothing added around it."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return ids


def sequence_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before one sequence: BOS, or none where it adds none."""
    bare = encode(["a"], tokenizer)[0]
    dressed: list[int] = tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    return []
