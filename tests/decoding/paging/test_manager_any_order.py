"""Whatever the order of calls: no leak, no double free, no page shared that differs."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)
from support.page_contents import PageContents

from llmopt.decoding.paging.groups import OutOfPagesError, PageGroup
from llmopt.decoding.paging.manager import PageManager

PAGE_SIZE = 3
GROUPS = (
    PageGroup("full", None, 10),
    PageGroup("narrow", 4, 9),
    PageGroup("wide", 8, 10),
    PageGroup("quantized", None, 7, full_pages_only=True),
    PageGroup("quantized of a window", 7, 6, full_pages_only=True),
)
# Prompts that agree as far as a page, or two, and part.
ROOTS = ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 1, 2, 9, 9, 9, 6, 7, 8], [5, 5, 5, 3, 4, 5])
prompts = st.builds(
    lambda root, length, end: [*root[:length], *end],
    st.sampled_from(ROOTS),
    st.integers(1, 11),
    st.lists(st.integers(0, 1), max_size=3),
)
drafts = st.lists(st.integers(0, 1), min_size=1, max_size=7)


class AnyOrder(RuleBasedStateMachine):
    """A manager beside a model of what is committed, reserved and written."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageManager(GROUPS, PAGE_SIZE)
        self.contents = PageContents(GROUPS, PAGE_SIZE)
        self.committed: dict[int, list[int]] = {}
        self.drafts: dict[int, list[int]] = {}
        self.past: list[list[int]] = []
        self.num_admitted = 0

    def _new(self) -> int:
        self.num_admitted += 1
        return self.num_admitted

    @rule(target=sequences, token_ids=prompts, num_expected=st.integers(0, 25))
    def admit(self, token_ids: list[int], num_expected: int) -> int:
        name = self._new()
        reused = self.pages.admit(name, token_ids, num_expected)
        assert reused % PAGE_SIZE == 0 and reused < len(token_ids)
        self.committed[name], self.drafts[name] = token_ids[:reused], []
        return name

    @rule(target=sequences, token_ids=prompts)
    def compute_a_prompt(self, token_ids: list[int]) -> int:
        name = self.admit(token_ids, len(token_ids) + 3)
        self.decode(name, token_ids[len(self.committed[name]) :])
        return name

    @rule(target=sequences, data=st.data(), more=drafts)
    def compute_what_was_there_before(self, data: st.DataObject, more: list[int]) -> object:
        if not self.past:
            return multiple()
        return self.compute_a_prompt([*data.draw(st.sampled_from(self.past)), *more])

    @rule(sequence=sequences, token_ids=drafts)
    def decode(self, sequence: int, token_ids: list[int]) -> None:
        self.truncate(sequence, 0)
        self.extend(sequence, token_ids)
        if self.drafts[sequence]:
            self.commit(sequence, [True] * len(token_ids))

    @rule(sequence=sequences, token_ids=drafts)
    def extend(self, sequence: int, token_ids: list[int]) -> None:
        before = self._state()
        if not self.pages.can_extend(sequence, len(token_ids)):
            with pytest.raises(OutOfPagesError):
                self.pages.extend(sequence, len(token_ids))
            assert self._state() == before
            return
        copies = self.pages.extend(sequence, len(token_ids))
        self.contents.copy(copies)
        start = len(self.committed[sequence]) + len(self.drafts[sequence])
        self.drafts[sequence] = self.drafts[sequence] + token_ids
        self._write(sequence, self.committed[sequence] + self.drafts[sequence], start)

    @rule(sequence=sequences, is_accepted=st.lists(st.booleans(), min_size=1))
    def commit(self, sequence: int, is_accepted: list[bool]) -> None:
        drafts = self.drafts[sequence]
        accepted = [token for token, keeps in zip(drafts, is_accepted, strict=False) if keeps]
        start = len(self.committed[sequence])
        # The runner moves the accepted path to the front; what lies after it means nothing.
        self._write(sequence, self.committed[sequence] + accepted, start)
        self.pages.commit(sequence, accepted)
        self.committed[sequence] = self.committed[sequence] + accepted
        self.drafts[sequence] = drafts[len(accepted) :]

    @rule(sequence=sequences, is_accepted=st.lists(st.booleans(), min_size=1, max_size=4))
    def speculate(self, sequence: int, is_accepted: list[bool]) -> None:
        self.extend(sequence, [1] * (len(is_accepted) + 3))
        self.commit(sequence, is_accepted)
        self.truncate(sequence, 0)

    @rule(sequence=sequences, num_kept=st.integers(0, 3))
    def truncate(self, sequence: int, num_kept: int) -> None:
        kept = self.drafts[sequence][:num_kept]
        self.pages.truncate(sequence, len(self.committed[sequence]) + len(kept))
        self.drafts[sequence] = kept

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: int) -> object:
        if self.drafts[parent]:
            with pytest.raises(AssertionError):
                self.pages.fork(parent, self.num_admitted + 1)
            return multiple()
        child = self._new()
        self.pages.fork(parent, child)
        self.committed[child], self.drafts[child] = list(self.committed[parent]), []
        return child

    @rule(sequence=consumes(sequences))
    def release(self, sequence: int) -> None:
        self.pages.release(sequence)
        self.past.append(self.committed[sequence])
        del self.committed[sequence], self.drafts[sequence]
        with pytest.raises(KeyError):
            self.pages.release(sequence)

    def _write(self, sequence: int, token_ids: list[int], start: int) -> None:
        """Write slots; nobody else may hold a page that is written."""
        for name, table in self.pages.tables(sequence).items():
            holders = self._holders()
            end = len(token_ids)
            if self.contents.groups[name].full_pages_only:
                end = end // PAGE_SIZE * PAGE_SIZE
            for position in range(start, end):
                page = table.pages[position // PAGE_SIZE - table.first_index]
                assert holders[name, page] == 1, "a page is written that another reads"
            self.contents.write(name, table, token_ids, start)

    def _holders(self) -> Counter[tuple[str, int]]:
        return Counter(
            (name, page)
            for sequence in self.committed
            for name, table in self.pages.tables(sequence).items()
            for page in table.pages
        )

    def _state(self) -> object:
        tables = {sequence: self.pages.tables(sequence) for sequence in self.committed}
        return tables, self.pages.num_free_pages()

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        for sequence, token_ids in self.committed.items():
            assert self.pages.num_tokens(sequence) == len(token_ids)
            for name, table in self.pages.tables(sequence).items():
                self.contents.check(name, table, token_ids)

    @invariant()
    def a_table_has_the_pages_of_its_tokens_and_no_more(self) -> None:
        for sequence, token_ids in self.committed.items():
            num_slots = len(token_ids) + len(self.drafts[sequence])
            for name, table in self.pages.tables(sequence).items():
                assert len(set(table.pages)) == len(table.pages)
                num_pages = num_slots // PAGE_SIZE
                if not self.contents.groups[name].full_pages_only and num_slots % PAGE_SIZE:
                    num_pages += 1
                assert table.first_index + len(table.pages) == num_pages

    @invariant()
    def every_page_is_counted(self) -> None:
        holders = self._holders()
        free = self.pages.num_free_pages()
        for group, pool in zip(GROUPS, self.pages._pools, strict=True):
            counts = [holders[group.name, page] for page in range(group.num_pages)]
            assert pool._references == counts
            assert sorted(pool._free) == [page for page, count in enumerate(counts) if not count]
            assert free[group.name] == counts.count(0)

    def teardown(self) -> None:
        for sequence in list(self.committed):
            self.release(sequence)
        assert self.pages.num_free_pages() == {group.name: group.num_pages for group in GROUPS}


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase
