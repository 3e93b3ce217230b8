"""What pages are handed out for, and the words in which they are handed out.

A page holds ``page_size`` consecutive tokens of a sequence; page ``k`` of a sequence holds the
positions ``k * page_size`` to ``(k + 1) * page_size - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.errors import BadInputError


class OutOfPagesError(Exception):
    """A pool has fewer free pages than asked for; nothing was taken from any pool."""


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Layers whose pages are handed out together, from one pool.

    Attributes:
        name: the group's name, unique in a manager.
        window: a query at position ``p`` reads the positions from ``p + 1 - window`` on, rounded
            down to a page; pages before it are freed. None reads all of them.
        num_pages: pages in the group's pool.
        full_pages_only: only pages all of whose tokens are there have a page in this group.
    """

    name: str
    window: int | None
    num_pages: int
    full_pages_only: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that hold nothing."""
        for what, size in (("num_pages", self.num_pages), ("window", self.window)):
            if size is not None and size < 1:
                raise BadInputError(
                    f"page group {self.name!r}: {what} is {size}", f"give a {what} of 1 or more"
                )

    def first_page(self, num_tokens: int, page_size: int) -> int:
        """Index of the first page that the query after ``num_tokens`` tokens reads."""
        if self.window is None:
            return 0
        return max(0, num_tokens + 1 - self.window) // page_size

    def end_page(self, num_tokens: int, page_size: int) -> int:
        """One past the index of the last page that ``num_tokens`` tokens need."""
        return num_tokens // page_size if self.full_pages_only else -(-num_tokens // page_size)

    def most_pages(self, num_tokens: int, page_size: int) -> int:
        """Most pages that a sequence of up to ``num_tokens`` tokens holds, computed one by one."""
        end = self.end_page(num_tokens, page_size)
        return (
            end if self.window is None else min(end, (self.window + page_size - 2) // page_size + 1)
        )


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages that a sequence holds in one group.

    Attributes:
        first_index: index in the sequence of the first page held: page ``first_index + i`` of the
            sequence is ``pages[i]`` of the pool.
        pages: numbers in the group's pool.
    """

    first_index: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageCopy:
    """A page to be copied, in every layer of the group, before the step writes.

    Attributes:
        group: the group's name.
        source: the shared page, read only.
        target: the page that is written from now on instead; no two copies of a step have the
            same one.
    """

    group: str
    source: int
    target: int
