"""Token streams that the demo model is trained and validated on."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from llmopt.calibration.documents import Document
from llmopt.demo.tokenizer import END_OF_TEXT_ID

VALIDATION_SHARE = 0.04
VALIDATION_TOKENS = 16_384
BOS_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token streams, each ``[tokens] int64`` with an end-of-text token before every document.

    Attributes:
        text: the train split without the validation slice.
        validation: a slice of the train split, for watching the training.
    """

    text: torch.Tensor
    validation: torch.Tensor


def build_corpus(tokenizer: Tokenizer, train: list[Document]) -> Corpus:
    """Return the streams of the train split; modules are held back for validation as a whole."""
    validation = [document for document in train if _is_validation(document)]
    text = [document for document in train if not _is_validation(document)]
    return Corpus(
        token_stream(tokenizer, (document.text for document in text)),
        token_stream(tokenizer, (d.text for d in validation or text))[:VALIDATION_TOKENS],
    )


def token_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> torch.Tensor:
    """Return the ids of all texts, each after an end-of-text token: ``[tokens] int64``."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids.append(END_OF_TEXT_ID)
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int64)


def training_batch(corpus: Corpus, step: int, rows: int, length: int, seed: int) -> torch.Tensor:
    """Return ``[rows, length] int64`` windows, a function of seed and step alone (for resuming)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    windows = []
    for _ in range(rows):
        bos_draw, place = torch.rand(2, generator=generator).tolist()
        start = int(place * max(1, len(corpus.text) - length))
        window = corpus.text[start : start + length].clone()
        if bos_draw < BOS_SHARE:  # a block of the evaluation starts with it, wherever it was cut
            window[0] = END_OF_TEXT_ID
        windows.append(window)
    return torch.stack(windows)


def _is_validation(document: Document) -> bool:
    unit = document.name.partition("#")[0]
    digest = hashlib.sha256(f"validation:{unit}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < VALIDATION_SHARE
