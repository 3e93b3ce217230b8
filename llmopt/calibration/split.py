"""The held-out split of a user's own text, and a sample of held-out text that is too long."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor

from llmopt.calibration.documents import Document
from llmopt.calibration.tokens import tokenize_documents
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64


def split_documents(
    documents: Iterable[Document], evaluation_share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Part ``documents`` into (calibration, evaluation) by a hash of their text.

    A document's side depends on its text and the seed alone: copies of a text stay together, and
    adding documents moves none of the others.

    Raises:
        BadInputError: a share outside 0..1, or a side left empty.
    """
    if not 0.0 < evaluation_share < 1.0:
        raise BadInputError(
            f"evaluation share {evaluation_share} is not between 0 and 1", "use for example 0.2"
        )
    calibration: list[Document] = []
    evaluation: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(f"{seed}:{document.sha256}".encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < evaluation_share * 2**64
        (evaluation if held_out else calibration).append(document)
    if not calibration or not evaluation:
        raise BadInputError(
            f"the text has {len(calibration) + len(evaluation)} documents, too few to hold out "
            f"{evaluation_share:.0%} of them",
            "give more text: a .txt is cut into documents at blank lines, a .jsonl has one a "
            "line, and judging takes thirty held-out ones",
        )
    return calibration, evaluation


@dataclass(frozen=True, slots=True)
class TokenSample:
    """What was kept of a text.

    Attributes:
        documents: name and ids ``(T,) int64`` without the tokenizer's prefix, in their order.
        num_left_out: documents not among them.
        num_shortened: documents that are there with their beginning alone.
    """

    documents: tuple[tuple[str, Tensor], ...]
    num_left_out: int
    num_shortened: int


def sample_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    min_documents: int,
) -> TokenSample:
    """Tokenize ``documents``; of a text longer than ``max_tokens``, a sample of that size.

    Documents are sampled in the order of their text's hash, so that the sample depends neither on
    their order nor on a seed. In a sample none is longer than ``max_tokens / min_documents``, so
    that a few long ones cannot be all of it: the rest of such a document is left out.
    """
    order = sorted(range(len(documents)), key=lambda index: (documents[index].sha256, index))
    tokenized = _tokenized([documents[index] for index in order], tokenizer)
    read: list[tuple[str, Tensor]] = []
    total = 0
    for document in tokenized:
        read.append(document)
        total += len(document[1])
        if total > max_tokens:
            break
    longest = max_tokens // min_documents if total > max_tokens else max_tokens
    kept: dict[int, tuple[str, Tensor]] = {}
    num_shortened = 0
    room = max_tokens
    for index, (name, ids) in zip(order, chain(read, tokenized), strict=True):
        room -= min(len(ids), longest)
        if room < 0:
            break
        kept[index] = (name, ids[:longest].clone())
        num_shortened += len(ids) > longest
    return TokenSample(
        tuple(kept[index] for index in sorted(kept)), len(documents) - len(kept), num_shortened
    )


def _tokenized(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Tensor]]:
    for start in range(0, len(documents), _BATCH):
        yield from tokenize_documents(documents[start : start + _BATCH], tokenizer)[0]
