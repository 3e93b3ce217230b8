"""One pool: counts, the index by content, the order of handing out."""

import pytest

from llmopt.decoding.paging.groups import OutOfPagesError
from llmopt.decoding.paging.pool import PagePool


def test_pages_of_one_sequence_lie_in_a_row() -> None:
    pool = PagePool(8)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    other = pool.allocate(1, after=6)
    assert other == [7]
    assert pool.allocate(2, after=2) == [3, 4]
    pool.release(1)
    assert pool.allocate(1, after=4) == [5], "the next page, rather than the one just given back"


def test_a_new_sequence_begins_where_all_that_it_expects_has_room() -> None:
    pool = PagePool(12)
    assert pool.allocate(1, expected=3) == [0]
    assert pool.allocate(2, expected=2) == [4, 5], "after what the first one expects"
    assert pool.allocate(1, expected=9) == [1], "no row is long enough: the first free page"
    pool.release(1)
    assert pool.allocate(3, after=0) == [1, 2, 3]
    assert pool.allocate(1, expected=3) == [8]
    pool.release(5)
    pool.release(4)
    assert pool.allocate(1, expected=3) == [4], "who is gone expects nothing"


def test_who_gave_its_pages_back_expects_nothing() -> None:
    pool = PagePool(8)
    pool.release(*pool.allocate(1, expected=3))
    assert pool.allocate(1) == [0]
    assert pool.allocate(1, expected=2) == [1]


def test_a_new_sequence_begins_where_the_least_is_missed() -> None:
    pool = PagePool(6)
    for page in pool.allocate(6):
        pool.publish(page, bytes([page]))
    for page in (4, 5, 2, 3, 0, 1):
        pool.release(page)
    assert pool.allocate(1, expected=1) == [4]
    assert pool.allocate(1, expected=1) == [2]
    assert [pool.find(bytes([page])) for page in range(6)] == [0, 1, None, 3, None, 5]


def test_a_page_without_known_content_is_missed_the_least() -> None:
    pool = PagePool(4)
    for page in pool.allocate(4):
        pool.publish(page, bytes([page]))
    for page in range(4):
        pool.release(page)
    for page in pool.allocate(2, after=1):
        pool.release(page)
    assert pool.allocate(1, expected=1) == [2]


def test_too_many_pages_take_none() -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(OutOfPagesError, match="3 pages wanted, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_page_is_free_with_its_last_hold_and_not_twice() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.share(page)
    assert pool.is_shared(page)
    pool.release(page)
    assert pool.num_free == 1 and pool.is_held(page) and not pool.is_shared(page)
    pool.release(page)
    assert pool.num_free == 2 and not pool.is_held(page)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(page)


def test_a_free_page_is_found_by_content_until_it_is_handed_out() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.release(first)
    assert pool.find(b"a") == first
    pool.share(first)
    assert pool.num_free == 0
    pool.release(first)
    pool.release(second)
    assert pool.allocate(1) == [second], "a page without known content goes first"
    assert pool.find(b"a") == first
    assert pool.allocate(1) == [first]
    assert pool.find(b"a") is None


def test_the_page_given_back_longest_ago_is_evicted_first() -> None:
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page in pages:
        pool.publish(page, bytes([page]))
    for page in (2, 0, 1):
        pool.release(page)
    pool.share(2)  # used again
    pool.release(2)
    assert [pool.allocate(1)[0] for _ in pages] == [0, 1, 2]


def test_of_equal_contents_one_page_is_known() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find(b"a") == first
    pool.release(second)
    assert pool.allocate(1) == [second]
    assert pool.find(b"a") == first


def test_what_is_forgotten_is_not_found_and_the_pages_go_on() -> None:
    pool = PagePool(3)
    held, free = pool.allocate(2)
    pool.publish(held, b"held")
    pool.publish(free, b"free")
    pool.release(free)
    pool.forget()
    assert pool.find(b"held") is None and pool.find(b"free") is None
    pool.publish(held, b"anew")
    assert pool.find(b"anew") == held
    pool.release(held)
    assert sorted(pool.allocate(3)) == [0, 1, 2] and pool.find(b"anew") is None
