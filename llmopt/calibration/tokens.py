"""Documents to token blocks of one length, and the count of what became of the text."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmopt.calibration.documents import Document
from llmopt.calibration.tokenizer import encode, sequence_prefix
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_PIECE_TOKENS = 16
"""A rest of a document shorter than this teaches nothing: it is dropped, and counted."""

_BATCH = 64


@dataclass(frozen=True, slots=True)
class TokenCoverage:
    """What became of the text on its way into the blocks.

    Attributes:
        documents_given: documents in the source.
        documents_used: those with at least one token in a block.
        documents_truncated: those of them that are not in the blocks to their end.
        tokens_used: tokens of documents in the blocks, prefixes and separators not counted.
        tokens_dropped: tokens of the used documents that are in no block.
        duplicated_bos_removed: documents whose own first token repeated the tokenizer's BOS, as
            chat templates write it.
        has_pad_token: no block is padded, so that a tokenizer without one is no error.
    """

    documents_given: int
    documents_used: int
    documents_truncated: int
    tokens_used: int
    tokens_dropped: int
    duplicated_bos_removed: int
    has_pad_token: bool


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """Blocks of tokens and where they came from.

    Attributes:
        blocks: ``(num_samples, sequence_length) int64``.
        documents: name and ids ``(T,) int64`` of every document that was reached, whole: what
            calibration may have seen.
        coverage: what became of the text.
    """

    blocks: Tensor
    documents: tuple[tuple[str, Tensor], ...]
    coverage: TokenCoverage


def tokenize_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[str, Tensor]], int]:
    """Name and ids ``(T,) int64`` of each document without the tokenizer's prefix.

    Returns:
        The documents in their order, and how many began with a BOS of their own (removed when
        the tokenizer adds one itself; ``sequence_prefix`` gives it).
    """
    repeated = _RepeatedBos(tokenizer)
    found = [
        (document.name, torch.tensor(repeated.strip(ids), dtype=torch.int64))
        for document, ids in zip(documents, _encoded(documents, tokenizer), strict=True)
    ]
    return found, repeated.count


def cut_blocks(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
) -> TokenBlocks:
    """Fill blocks from the documents in an order shuffled by ``seed``.

    Each block begins as the tokenizer begins one sequence. Short documents are packed, a blank
    line between them. A long one is cut at the end of its block; its rest is used only after
    every document has had its turn, so that blocks come from as many documents as there are.

    Raises:
        BadInputError: a text too short for the blocks asked for, or blocks too short for text.
    """
    prefix = sequence_prefix(tokenizer)
    if num_samples < 1 or sequence_length < len(prefix) + MIN_PIECE_TOKENS:
        raise BadInputError(
            f"{num_samples} blocks of {sequence_length} tokens cannot hold text",
            f"ask for one block or more of {len(prefix) + MIN_PIECE_TOKENS} tokens or more",
        )
    repeated = _RepeatedBos(tokenizer)
    order = list(documents)
    random.Random(seed).shuffle(order)
    fresh = (
        _Piece(index, repeated.strip(ids)) for index, ids in enumerate(_encoded(order, tokenizer))
    )
    packer = _Packer(fresh, prefix, encode(["\n\n"], tokenizer)[0])
    blocks = [block for _ in range(num_samples) if (block := packer.fill(sequence_length))]
    if len(blocks) < num_samples:
        capacity = sequence_length - len(prefix)
        num_tokens = sum(map(len, packer.reached.values()))
        raise BadInputError(
            f"the calibration text is too short: {num_samples} blocks of {sequence_length} tokens "
            f"need {num_samples * capacity} tokens, it has {num_tokens}, "
            f"enough for {len(blocks)} blocks",
            "give more text, or ask for fewer samples or a shorter sequence length",
        )
    coverage = packer.coverage(len(documents), repeated.count, tokenizer.pad_token_id is not None)
    reached = tuple(
        (order[index].name, torch.tensor(ids, dtype=torch.int64))
        for index, ids in packer.reached.items()
    )
    return TokenBlocks(torch.tensor(blocks, dtype=torch.int64), reached, coverage)


def _encoded(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    for start in range(0, len(documents), _BATCH):
        yield from encode([d.text for d in documents[start : start + _BATCH]], tokenizer)


class _RepeatedBos:
    """Takes away a document's own BOS where the tokenizer adds one, and counts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        prefix = sequence_prefix(tokenizer)
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id in prefix else None
        self.count = 0

    def strip(self, ids: list[int]) -> list[int]:
        first = 0
        while self.bos is not None and first < len(ids) and ids[first] == self.bos:
            first += 1
        self.count += first > 0
        return ids[first:]


@dataclass(frozen=True, slots=True)
class _Piece:
    document: int
    ids: list[int]


class _Packer:
    """Fills one block after another; keeps each document reached and how much of it was used."""

    def __init__(self, fresh: Iterator[_Piece], prefix: list[int], separator: list[int]) -> None:
        self.fresh = fresh
        self.rests: deque[_Piece] = deque()
        self.prefix = prefix
        self.separator = separator
        self.reached: dict[int, list[int]] = {}
        self.used: dict[int, int] = {}

    def fill(self, sequence_length: int) -> list[int] | None:
        """The next full block, or ``None`` when the text is used up."""
        block = list(self.prefix)
        empty = len(block)
        while (space := sequence_length - len(block)) > 0:
            if len(block) > empty and space > len(self.separator):
                block += self.separator
                space -= len(self.separator)
            piece = self._next_piece()
            if piece is None:
                return None
            block += piece.ids[:space]
            self.used[piece.document] = self.used.get(piece.document, 0) + min(
                space, len(piece.ids)
            )
            if len(piece.ids) - space >= MIN_PIECE_TOKENS:
                self.rests.append(_Piece(piece.document, piece.ids[space:]))
        return block

    def _next_piece(self) -> _Piece | None:
        for piece in self.fresh:
            if piece.ids:
                self.reached[piece.document] = piece.ids
                return piece
        return self.rests.popleft() if self.rests else None

    def coverage(self, given: int, repeated_bos: int, has_pad_token: bool) -> TokenCoverage:
        truncated = [d for d, used in self.used.items() if used < len(self.reached[d])]
        tokens_used = sum(self.used.values())
        return TokenCoverage(
            documents_given=given,
            documents_used=len(self.used),
            documents_truncated=len(truncated),
            tokens_used=tokens_used,
            tokens_dropped=sum(len(self.reached[d]) for d in self.used) - tokens_used,
            duplicated_bos_removed=repeated_bos,
            has_pad_token=has_pad_token,
        )
