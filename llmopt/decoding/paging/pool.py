"""One pool of pages: counted references, an index by content, and which page to hand out next."""

from __future__ import annotations

from collections import OrderedDict

from llmopt.decoding.paging.groups import OutOfPagesError


class PagePool:
    """Pages ``0`` to ``num_pages - 1``, each free or held by one or more sequences.

    A free page whose content is known stays findable until it is handed out again: the pages
    without known content go first, then the one that was given back the longest time ago. That
    holds for the stretch of pages that a new sequence gets as well, by the latest of its pages.

    Args:
        num_pages: pages in the pool.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._digests: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}
        self._expected: dict[int, int] = {}  # after a page: how many more its sequence may want
        self._released = [0] * num_pages  # when a page was given back; 0 without known content
        self._now = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, those with known content among them."""
        return len(self._free)

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds the page."""
        return self._references[page] > 1

    def is_held(self, page: int) -> bool:
        """Whether any sequence holds the page."""
        return self._references[page] > 0

    def allocate(self, count: int, after: int | None = None, expected: int = 0) -> list[int]:
        """Hand out pages, each held once and without known content.

        Args:
            count: how many.
            after: the page that they continue. Where the next page of the pool is free, it is
                taken, so that pages of one sequence tend to lie in a row.
            expected: how many more may be asked for later, to continue these. A new sequence begins
                where there is room for all of them, other sequences' expectations apart.

        Returns:
            The pages, in order.

        Raises:
            OutOfPagesError: fewer are free; none was taken.
        """
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages wanted, {self.num_free} free")
        pages: list[int] = []
        if after is None and expected:
            after = self._before_stretch(count + expected)
        self._expected.pop(-1 if after is None else after, None)
        for _ in range(count):
            after = self._next_page(after)
            self._free.pop(after)
            self._forget(after)
            self._references[after] = 1
            pages.append(after)
        if expected and after is not None:
            self._expected[after] = expected
        return pages

    def share(self, page: int) -> None:
        """Hold a page once more; a free one is taken out of the free ones."""
        if not self._references[page]:
            self._free.pop(page)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Hold a page once less; with the last hold it is free."""
        assert self._references[page] > 0, f"page {page} is free already"
        self._references[page] -= 1
        if self._references[page]:
            return
        self._expected.pop(page, None)
        self._free[page] = None
        if self._digests[page] is None:
            self._free.move_to_end(page, last=False)
            self._released[page] = 0
        else:
            self._now += 1
            self._released[page] = self._now

    def publish(self, page: int, digest: bytes) -> None:
        """Say what a held page contains; of pages with equal contents the first stays the known."""
        assert self._references[page] > 0 and self._digests[page] is None
        if digest not in self._pages:
            self._pages[digest] = page
            self._digests[page] = digest

    def forget(self) -> None:
        """Drop what is known of all pages' contents, those of held pages too."""
        self._digests = [None] * self.num_pages
        self._pages.clear()
        self._released = [0] * self.num_pages

    def find(self, digest: bytes) -> int | None:
        """The page with this content, held or free."""
        return self._pages.get(digest)

    def _next_page(self, after: int | None) -> int:
        """The free page after ``after``, else the one whose content is the least missed."""
        if after is not None and after + 1 in self._free:
            return after + 1
        return next(iter(self._free))

    def _before_stretch(self, length: int) -> int | None:
        """The page before ``length`` free ones in a row that are the least missed, if any are."""
        best: int | None = None
        earliest = self._now + 1
        start = 0
        for page, references in enumerate(self._references):
            if references:
                start = page + 1 + self._expected.get(page, 0)
            elif page + 1 - start == length:
                latest = max(self._released[start : page + 1])
                if latest < earliest:
                    best, earliest = start - 1, latest
                start = page + 1
        return best

    def _forget(self, page: int) -> None:
        """Drop what is known of a page's content."""
        digest = self._digests[page]
        if digest is not None:
            del self._pages[digest]
            self._digests[page] = None
