"""The page manager, case by case; test_manager_any_order.py has them in any order."""

import pytest

from llmopt.decoding.paging.groups import OutOfPagesError, PageCopy, PageGroup, PageTable
from llmopt.decoding.paging.manager import PageManager
from llmopt.errors import BadInputError

PAGE_SIZE = 4


def manager(*groups: PageGroup, **options: bool) -> PageManager:
    return PageManager(groups or (PageGroup("full", None, 8),), PAGE_SIZE, **options)


def compute(pages: PageManager, sequence_id: int, token_ids: list[int]) -> int:
    """Admit a sequence and commit all its tokens; how many were there already."""
    reused = pages.admit(sequence_id, token_ids)
    pages.extend(sequence_id, len(token_ids) - reused)
    pages.commit(sequence_id, token_ids[reused:])
    return reused


def test_a_finished_prompt_is_found_again_as_far_as_it_agrees() -> None:
    pages = manager()
    assert compute(pages, 1, list(range(10))) == 0
    before = pages.table(1, "full")
    pages.release(1)
    assert pages.admit(2, [*range(8), 99, 98]) == 8
    assert pages.table(2, "full") == PageTable(0, before.pages[:2])
    assert pages.admit(3, [0, 1, 2, 3, 99, 5, 6, 7, 8]) == 4, "the second page differs"
    assert pages.admit(4, [99, 1, 2, 3, 4, 5, 6, 7, 8]) == 0, "a page is of its whole prefix"


def test_the_last_token_is_never_reused() -> None:
    pages = manager()
    compute(pages, 1, list(range(8)))
    assert pages.admit(2, list(range(8))) == 4
    assert pages.admit(3, list(range(9))) == 8
    assert pages.admit(4, [0]) == 0


def test_no_reuse_when_it_is_not_wanted() -> None:
    pages = manager(reuse_prefixes=False)
    compute(pages, 1, list(range(9)))
    assert pages.admit(2, list(range(9))) == 0


def test_what_was_evicted_is_not_reused() -> None:
    pages = manager(PageGroup("full", None, 3))
    compute(pages, 1, list(range(9)))
    pages.release(1)
    compute(pages, 2, [7, 7])
    compute(pages, 3, [8, 8])
    # One page never had known content; the tail of the prefix goes before its head.
    assert pages.admit(4, list(range(9))) == 4


def test_a_prefix_is_reused_only_when_every_group_has_what_it_reads() -> None:
    full, window = PageGroup("full", None, 8), PageGroup("window", 4, 4)
    pages = manager(full, window)
    compute(pages, 1, list(range(9)))
    assert pages.table(1, "full").first_index == 0
    assert pages.table(1, "window").first_index == 1
    pages.release(1)
    compute(pages, 2, [50] * 3)  # takes the page of the window's pool without known content
    assert pages.admit(3, list(range(9))) == 8
    assert pages.table(3, "window").first_index == 1
    pages.release(3)
    compute(pages, 4, [60] * 11)  # evicts the window's pages, not the other group's
    assert pages.admit(5, list(range(9))) == 0
    assert pages.table(5, "full").pages == ()


def test_layers_of_windows_alone_need_no_page_before_the_window() -> None:
    pages = manager(PageGroup("window", 4, 4))
    compute(pages, 1, list(range(8)))
    pages.extend(1, 6)
    pages.commit(1, list(range(8, 14)))
    pages.release(1)
    compute(pages, 2, [50, 50])  # evicts nothing that is read below
    assert pages.admit(3, list(range(13))) == 12
    assert pages.table(3, "window").first_index == 2


def test_a_page_within_the_window_is_not_reused_after_another_prefix() -> None:
    pages = manager(PageGroup("window", 4, 8))
    compute(pages, 1, [1, 1, 1, 1, *range(5)])
    assert pages.admit(2, [2, 2, 2, 2, *range(5)]) == 0
    assert pages.admit(3, [1, 1, 1, 1, *range(5)]) == 8


def test_a_window_frees_a_page_once_no_later_query_reads_it() -> None:
    pages = manager(PageGroup("window", 5, 8))
    pages.admit(1, [0])
    pages.extend(1, 12)
    for num_tokens, first in ((7, 0), (8, 1), (11, 1), (12, 2)):
        pages.commit(1, [0] * (num_tokens - pages.num_tokens(1)))
        # The next query, at num_tokens, reads from num_tokens - 4 on.
        assert pages.table(1, "window").first_index == first
        assert pages.num_free_pages() == {"window": 8 - (3 - first)}


def test_a_group_of_full_pages_gets_its_page_in_the_step_that_fills_it() -> None:
    pages = manager(PageGroup("quantized", None, 8, full_pages_only=True))
    pages.admit(1, [0])
    pages.extend(1, 3)
    assert pages.table(1, "quantized").pages == ()
    pages.extend(1, 1)
    assert len(pages.table(1, "quantized").pages) == 1
    pages.truncate(1, 3)
    assert pages.table(1, "quantized").pages == ()


def test_a_fork_shares_pages_until_one_of_the_two_writes() -> None:
    pages = manager()
    compute(pages, 1, [0, 1, 2, 3, 4])
    pages.fork(1, 2)
    shared = pages.table(1, "full")
    assert pages.table(2, "full") == shared
    (copy,) = pages.extend(2, 1)
    assert copy == PageCopy("full", shared.pages[1], pages.table(2, "full").pages[1])
    assert pages.table(1, "full") == shared
    assert pages.table(2, "full").pages[0] == shared.pages[0], "a full page is not written"
    assert pages.extend(1, 1) == [], "its last page is its own again"


def test_a_fork_at_the_end_of_a_page_copies_nothing() -> None:
    pages = manager()
    compute(pages, 1, [0, 1, 2, 3])
    pages.fork(1, 2)
    assert pages.extend(1, 1) == pages.extend(2, 1) == []
    first, second = pages.table(1, "full").pages, pages.table(2, "full").pages
    assert first[0] == second[0] and first[1] != second[1]


def test_rejected_drafts_give_their_pages_back() -> None:
    pages = manager()
    compute(pages, 1, [0, 1, 2])
    pages.extend(1, 7)
    assert len(pages.table(1, "full").pages) == 3
    pages.commit(1, [3, 4])
    pages.truncate(1, 5)
    assert len(pages.table(1, "full").pages) == 2
    pages.release(1)
    assert pages.admit(2, [0, 1, 2, 3, 9]) == 4
    with pytest.raises(AssertionError):
        pages.truncate(2, 3)


def test_out_of_pages_changes_no_group() -> None:
    pages = manager(PageGroup("large", None, 8), PageGroup("small", None, 1))
    pages.admit(1, [0])
    assert pages.can_extend(1, 4) and not pages.can_extend(1, 5)
    with pytest.raises(OutOfPagesError, match="2 pages of group 'small' wanted, 1 of 1 free"):
        pages.extend(1, 5)
    assert pages.num_free_pages() == {"large": 8, "small": 1}
    assert pages.extend(1, 4) == []


def test_the_copy_on_write_is_counted_among_the_pages_wanted() -> None:
    pages = manager(PageGroup("full", None, 3))
    compute(pages, 1, [0, 1, 2, 3, 4])
    pages.fork(1, 2)
    assert pages.can_extend(2, 1) and not pages.can_extend(2, 4)
    with pytest.raises(OutOfPagesError, match="2 pages of group 'full' wanted, 1 of 3 free"):
        pages.extend(2, 4)
    assert pages.table(1, "full") == pages.table(2, "full")


def test_more_than_was_reserved_cannot_be_committed() -> None:
    pages = manager()
    pages.admit(1, [0])
    pages.extend(1, 1)
    with pytest.raises(AssertionError):
        pages.commit(1, [0, 1])


def test_fits_counts_a_window_s_pages_once() -> None:
    pages = manager(PageGroup("full", None, 8), PageGroup("window", 4, 2))
    assert pages.fits(32) and not pages.fits(33)
    assert not manager(PageGroup("window", 6, 2)).fits(32)


def test_pages_to_admit_leaves_out_those_that_others_hold() -> None:
    pages = manager(PageGroup("full", None, 8), PageGroup("window", 4, 8))
    compute(pages, 1, list(range(9)))
    # Of 11 tokens: three pages of which two are there; of the window's two, the one in reach.
    assert pages.pages_to_admit([*range(8), 99], 11) == [1, 1]
    assert pages.pages_to_grow(1, 13) == [1, 0]
    pages.release(1)
    assert pages.pages_to_admit([*range(8), 99], 11) == [3, 2]


def test_groups_that_cannot_be_told_apart_are_refused() -> None:
    group = PageGroup("full", None, 8)
    with pytest.raises(BadInputError, match="two of one name"):
        manager(group, group)
    with pytest.raises(BadInputError, match="page_size is 0"):
        PageManager([group], 0)
