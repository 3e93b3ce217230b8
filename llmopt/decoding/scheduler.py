"""Which tokens of which sequences the next step computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.decoding.paging.groups import PageCopy, PageTable
from llmopt.decoding.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence that a step computes.

    Attributes:
        sequence: whose tokens they are.
        start: position of the first of them; all before it are in the cache.
        num_tokens: at least one.
        tables: of each page group, the pages that the sequence holds during the step, those of the
            chunk's tokens among them.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    tables: Mapping[str, PageTable]

    @property
    def token_ids(self) -> list[int]:
        """The tokens that are computed."""
        return self.sequence.token_ids[self.start : self.start + self.num_tokens]

    @property
    def samples(self) -> bool:
        """Whether the chunk ends with the last known token, so that its logits say the next."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One forward: copy the pages, then write and attend chunk by chunk.

    Attributes:
        chunks: at most one a sequence, oldest sequence first.
        copies: to be made in this order before anything is written.
    """

    chunks: tuple[ScheduledChunk, ...]
    copies: tuple[PageCopy, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)
