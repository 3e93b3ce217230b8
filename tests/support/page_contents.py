"""What the pages of a cache contain, modelled: a slot holds all tokens up to its own.

A key at position ``p`` depends on just these; so a page that is shared by mistake, or written while
another reads it, is seen as a wrong prefix.
"""

from collections.abc import Iterable, Sequence

from llmopt.decoding.paging.groups import PageCopy, PageGroup, PageTable

Prefix = tuple[int, ...]


class PageContents:
    """The slots of every page of every group."""

    def __init__(self, groups: Iterable[PageGroup], page_size: int) -> None:
        self.page_size = page_size
        self.groups = {group.name: group for group in groups}
        self.pages: dict[str, list[list[Prefix | None]]] = {
            name: [[None] * page_size for _ in range(group.num_pages)]
            for name, group in self.groups.items()
        }

    def copy(self, copies: Iterable[PageCopy]) -> None:
        for copy in copies:
            assert copy.source != copy.target
            self.pages[copy.group][copy.target] = list(self.pages[copy.group][copy.source])

    def write(self, name: str, table: PageTable, token_ids: Sequence[int], start: int) -> None:
        """Write the slots from position ``start`` to the last of ``token_ids``.

        A group of full pages is written a page at a time, once its last token is there.
        """
        end = len(token_ids)
        if self.groups[name].full_pages_only:
            start, end = (n // self.page_size * self.page_size for n in (start, end))
        for position in range(start, end):
            index = position // self.page_size - table.first_index
            assert index >= 0
            slots = self.pages[name][table.pages[index]]
            slots[position % self.page_size] = tuple(token_ids[: position + 1])

    def check(self, name: str, table: PageTable, token_ids: Sequence[int]) -> None:
        """Hold against them what the query after ``token_ids`` reads, and the first index."""
        self.check_readable(name, table, token_ids, len(token_ids))
        group = self.groups[name]
        if group.window is not None:
            read_from = max(0, len(token_ids) + 1 - group.window)
            assert table.first_index == read_from // self.page_size
        else:
            assert table.first_index == 0

    def check_readable(
        self, name: str, table: PageTable, token_ids: Sequence[int], query: int
    ) -> None:
        """Hold against the tokens what the query at position ``query`` and those after it read."""
        group, size = self.groups[name], self.page_size
        read_from = 0 if group.window is None else max(0, query + 1 - group.window)
        end = len(token_ids) // size * size if group.full_pages_only else len(token_ids)
        for position in range(read_from // size * size, end):
            index = position // size - table.first_index
            assert index >= 0, "a page that is read was freed"
            slots = self.pages[name][table.pages[index]]
            assert slots[position % size] == tuple(token_ids[: position + 1])
