"""Which page of which pool holds which tokens of which sequence.

The life of a sequence: ``admit`` finds the longest prefix that is in the cache already; ``extend``
reserves slots for the tokens that a step computes; ``commit`` says that the first so many of them
are written and final; ``truncate`` gives back what was reserved and is not wanted (rejected drafts
of speculation); ``release`` lets everything go. ``fork`` lets a second sequence share all that the
first has committed, page by page, until one of them writes to a page that both hold.

Pages are found again by the content of the whole prefix up to their end, as a chain of digests:
a page's keys and values depend on every token before them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmopt.decoding.paging.groups import OutOfPagesError, PageCopy, PageGroup, PageTable
from llmopt.decoding.paging.pool import PagePool
from llmopt.errors import BadInputError


def page_digest(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full page's content: its tokens, after the prefix named ``before``."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16, key=before).digest()


@dataclass(slots=True)
class _Held:
    """What one sequence holds.

    Attributes:
        num_committed: tokens whose keys and values are written and final.
        num_reserved: tokens that there are slots for; the committed ones among them.
        num_expected: tokens that there may be at last, as far as known.
        digest: of the last full committed page, empty without one.
        tail: committed tokens after that page.
        first: in each group, index of the first page held.
        pages: in each group, the pages held.
    """

    num_committed: int
    num_reserved: int
    num_expected: int
    digest: bytes
    tail: list[int]
    first: list[int]
    pages: list[list[int]]


@dataclass(frozen=True, slots=True)
class _Growth:
    """What an extension takes from one group's pool.

    Attributes:
        num_pages: new pages at the end.
        num_expected: further pages that later extensions may want to follow them.
        copies: whether the last page held is shared and about to be written, hence replaced.
    """

    num_pages: int
    num_expected: int
    copies: bool

    @property
    def num_taken(self) -> int:
        """Free pages needed."""
        return self.num_pages + self.copies


class PageManager:
    """Hands out the pages of every group to sequences.

    Args:
        groups: the page groups of the model; at least one.
        page_size: tokens a page, the same in every group.
        reuse_prefixes: whether pages of equal content are shared and kept after their release.

    Raises:
        BadInputError: no group, two of one name, or a page of no tokens.
    """

    def __init__(
        self, groups: Sequence[PageGroup], page_size: int, reuse_prefixes: bool = True
    ) -> None:
        if page_size < 1:
            raise BadInputError(f"page_size is {page_size}", "give a page_size of 1 or more")
        names = [group.name for group in groups]
        if not names or len(set(names)) < len(names):
            raise BadInputError(
                f"page groups {names}: none, or two of one name", "give each group its own name"
            )
        self.groups = tuple(groups)
        self.page_size = page_size
        self.reuse_prefixes = reuse_prefixes
        self._pools = [PagePool(group.num_pages) for group in groups]
        self._index = {name: index for index, name in enumerate(names)}
        self._held: dict[int, _Held] = {}

    def num_free_pages(self) -> dict[str, int]:
        """Of each group, the pages that no sequence holds."""
        return {group.name: pool.num_free for group, pool in self._each()}

    def num_tokens(self, sequence_id: int) -> int:
        """Tokens of the sequence that are committed."""
        return self._held[sequence_id].num_committed

    def table(self, sequence_id: int, group: str) -> PageTable:
        """The pages that the sequence holds in the group called ``group``."""
        held, index = self._held[sequence_id], self._index[group]
        return PageTable(held.first[index], tuple(held.pages[index]))

    def tables(self, sequence_id: int) -> dict[str, PageTable]:
        """The pages that the sequence holds, by the groups' names."""
        return {name: self.table(sequence_id, name) for name in self._index}

    def admit(self, sequence_id: int, token_ids: Sequence[int], num_expected: int = 0) -> int:
        """Take a sequence in, with the pages of its longest prefix found in the cache.

        The prefix must lie in every group, there as far as a query after it reads. It is never the
        whole of the tokens: the last one is computed anew, for its logits.

        Args:
            sequence_id: the key of the sequence from now on.
            token_ids: those known.
            num_expected: tokens that there may be at last. The sequence's pages are laid in a row
                if the pool has one long enough; nothing is reserved.

        Returns:
            Tokens reused; they count as committed.
        """
        assert sequence_id not in self._held
        digests = self._reusable(token_ids)
        num_tokens = len(digests) * self.page_size
        digest = digests[-1] if digests else b""
        held = _Held(num_tokens, num_tokens, num_expected, digest, [], [], [])
        for group, pool in self._each():
            first = group.first_page(num_tokens, self.page_size)
            pages = _found(pool, digests[first:])
            for page in pages:
                pool.share(page)
            held.first.append(first)
            held.pages.append(pages)
        self._held[sequence_id] = held
        return num_tokens

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` tokens fits when nothing else holds pages."""
        return all(
            group.most_pages(num_tokens, self.page_size) <= group.num_pages for group in self.groups
        )

    def pages_to_admit(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Free pages, a number a group, that a sequence takes until it has ``num_tokens`` tokens.

        Args:
            token_ids: what it would be admitted with; pages of its prefix that others hold at
                present are not counted.
            num_tokens: at least as many. A window's pages are counted for one token a step; the
                chunks of a prompt take more for the length of their step.
        """
        digests = self._reusable(token_ids)
        pages = []
        for group, pool in self._each():
            first = group.first_page(len(digests) * self.page_size, self.page_size)
            held = sum(pool.is_held(page) for page in _found(pool, digests[first:]))
            pages.append(group.most_pages(num_tokens, self.page_size) - held)
        return pages

    def pages_to_grow(self, sequence_id: int, num_tokens: int) -> list[int]:
        """Free pages, a number a group, that an admitted sequence takes yet; see above."""
        return [
            max(0, group.most_pages(num_tokens, self.page_size) - len(pages))
            for group, pages in zip(self.groups, self._held[sequence_id].pages, strict=True)
        ]

    def can_extend(self, sequence_id: int, num_tokens: int) -> bool:
        """Whether the pools have the pages that ``extend`` would take."""
        growths = self._growths(self._held[sequence_id], num_tokens)
        return all(
            growth.num_taken <= pool.num_free
            for growth, pool in zip(growths, self._pools, strict=True)
        )

    def extend(self, sequence_id: int, num_tokens: int) -> list[PageCopy]:
        """Reserve slots for ``num_tokens`` more tokens of a sequence, at least one.

        Returns:
            The copies to be made, before anything is written, of pages that were shared and that
            the new tokens are written to.

        Raises:
            OutOfPagesError: a pool lacks the pages; nothing has changed.
        """
        held = self._held[sequence_id]
        growths = self._growths(held, num_tokens)
        for growth, (group, pool) in zip(growths, self._each(), strict=True):
            if growth.num_taken > pool.num_free:
                raise OutOfPagesError(
                    f"{growth.num_taken} pages of group {group.name!r} wanted, "
                    f"{pool.num_free} of {pool.num_pages} free"
                )
        copies: list[PageCopy] = []
        for growth, (group, pool), pages in zip(growths, self._each(), held.pages, strict=True):
            if growth.copies:
                source = pages.pop()
                before = pages[-1] if pages else None
                (target,) = pool.allocate(1, before)
                pool.release(source)
                pages.append(target)
                copies.append(PageCopy(group.name, source, target))
            if growth.num_pages:
                before = pages[-1] if pages else None
                pages += pool.allocate(growth.num_pages, before, growth.num_expected)
        held.num_reserved += num_tokens
        return copies

    def commit(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        """Say that the next reserved tokens are ``token_ids``, written and final.

        Pages that they fill can be found by others from now on; pages that fell out of a group's
        window are given back.
        """
        held = self._held[sequence_id]
        assert held.num_committed + len(token_ids) <= held.num_reserved
        held.num_committed += len(token_ids)
        held.tail += token_ids
        self._publish_full_pages(held)
        for index, (group, pool) in enumerate(self._each()):
            first = group.first_page(held.num_committed, self.page_size)
            self._drop(pool, held.pages[index], range(first - held.first[index]))
            held.first[index] = first

    def truncate(self, sequence_id: int, num_tokens: int) -> None:
        """Give back the slots after the first ``num_tokens`` tokens; none of them is committed."""
        held = self._held[sequence_id]
        assert held.num_committed <= num_tokens <= held.num_reserved
        held.num_reserved = num_tokens
        for index, (group, pool) in enumerate(self._each()):
            pages = held.pages[index]
            end = group.end_page(num_tokens, self.page_size) - held.first[index]
            self._drop(pool, pages, range(end, len(pages)))

    def fork(self, parent_id: int, child_id: int) -> None:
        """Let a new sequence share everything of one whose reserved tokens are all committed."""
        parent = self._held[parent_id]
        assert child_id not in self._held and parent.num_reserved == parent.num_committed
        for pool, pages in zip(self._pools, parent.pages, strict=True):
            for page in pages:
                pool.share(page)
        self._held[child_id] = _Held(
            parent.num_committed,
            parent.num_reserved,
            parent.num_expected,
            parent.digest,
            list(parent.tail),
            list(parent.first),
            [list(pages) for pages in parent.pages],
        )

    def release(self, sequence_id: int) -> None:
        """Let go of all that a sequence holds: it is finished, cancelled or preempted."""
        held = self._held.pop(sequence_id)
        for pool, pages in zip(self._pools, held.pages, strict=True):
            self._drop(pool, pages, range(len(pages)))

    def forget(self) -> None:
        """Let no content be found again that is in the pages now: it may be wrong."""
        for pool in self._pools:
            pool.forget()

    def _each(self) -> Iterator[tuple[PageGroup, PagePool]]:
        """The groups with their pools."""
        return zip(self.groups, self._pools, strict=True)

    def _growths(self, held: _Held, num_tokens: int) -> list[_Growth]:
        """What ``num_tokens`` more slots take from each pool."""
        growths = []
        for index, (group, pool) in enumerate(self._each()):
            pages = held.pages[index]
            end = group.end_page(held.num_reserved + num_tokens, self.page_size)
            writes_to_last = held.num_reserved % self.page_size and not group.full_pages_only
            copies = bool(writes_to_last) and pool.is_shared(pages[-1])
            expected = group.end_page(held.num_expected, self.page_size) - end
            # A window's pages move through the pool: no room is kept for them.
            expected = 0 if group.window else max(0, expected)
            growths.append(_Growth(end - held.first[index] - len(pages), expected, copies))
        return growths

    def _publish_full_pages(self, held: _Held) -> None:
        """Make what the tail has filled findable, and cut it off the tail."""
        size = self.page_size
        num_full = held.num_committed // size
        for page_index in range(num_full - len(held.tail) // size, num_full):
            held.digest = page_digest(held.digest, held.tail[:size])
            del held.tail[:size]
            if self.reuse_prefixes:
                for index, pool in enumerate(self._pools):
                    pool.publish(held.pages[index][page_index - held.first[index]], held.digest)

    def _reusable(self, token_ids: Sequence[int]) -> list[bytes]:
        """Digests of the pages of the longest prefix that every group has what it reads of."""
        size = self.page_size
        digests: list[bytes] = []
        longest = 0
        in_a_row = [0] * len(self.groups)  # pages found in each group, up to the present one
        if not self.reuse_prefixes:
            return digests
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            before = digests[-1] if digests else b""
            digests.append(page_digest(before, token_ids[start : start + size]))
            num_pages, enough = len(digests), True
            for index, (group, pool) in enumerate(self._each()):
                in_a_row[index] = 0 if pool.find(digests[-1]) is None else in_a_row[index] + 1
                first = group.first_page(num_pages * size, size)
                enough = enough and in_a_row[index] >= num_pages - first
            if enough:
                longest = num_pages
        return digests[:longest]

    @staticmethod
    def _drop(pool: PagePool, pages: list[int], which: range) -> None:
        """Give back a run of a sequence's pages, the last first: a chain is of use from its head.

        So the tail of a prefix is evicted before what it continues.
        """
        for page in reversed(pages[which.start : which.stop]):
            pool.release(page)
        del pages[which.start : which.stop]


def _found(pool: PagePool, digests: Iterable[bytes]) -> list[int]:
    """The pages with these contents, all of which are known to be there."""
    pages = [pool.find(digest) for digest in digests]
    assert None not in pages
    return [page for page in pages if page is not None]
