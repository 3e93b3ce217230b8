"""Which pages a group needs, against a count position by position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.decoding.paging.groups import PageGroup
from llmopt.errors import BadInputError


def pages_held(group: PageGroup, num_tokens: int, chunk: int, page_size: int) -> int:
    """Pages held while ``chunk`` tokens after ``num_tokens`` are computed."""
    read_from = 0 if group.window is None else max(0, num_tokens + 1 - group.window)
    read_from -= read_from % page_size
    pages = {position // page_size for position in range(read_from, num_tokens + chunk)}
    if group.full_pages_only:
        pages = {page for page in pages if (page + 1) * page_size <= num_tokens + chunk}
    return len(pages)


@given(
    window=st.none() | st.integers(1, 20),
    full_pages_only=st.booleans(),
    num_tokens=st.integers(0, 50),
    chunk=st.integers(1, 9),
    page_size=st.integers(1, 6),
)
def test_first_and_end_page(
    window: int | None, full_pages_only: bool, num_tokens: int, chunk: int, page_size: int
) -> None:
    group = PageGroup("g", window, 1, full_pages_only)
    first = group.first_page(num_tokens, page_size)
    end = group.end_page(num_tokens + chunk, page_size)
    assert end - first == pages_held(group, num_tokens, chunk, page_size)


@given(
    window=st.none() | st.integers(1, 20),
    num_tokens=st.integers(1, 60),
    page_size=st.integers(1, 6),
    full_pages_only=st.booleans(),
)
def test_most_pages_is_reached_and_never_passed(
    window: int | None, num_tokens: int, page_size: int, full_pages_only: bool
) -> None:
    group = PageGroup("g", window, 1, full_pages_only)
    most = max(pages_held(group, before, 1, page_size) for before in range(num_tokens))
    bound = group.most_pages(num_tokens, page_size)
    assert most <= bound
    if not full_pages_only and num_tokens >= (window or 0) + page_size:  # all alignments came up
        assert most == bound


def test_sizes_that_hold_nothing_are_refused() -> None:
    with pytest.raises(BadInputError, match="num_pages is 0"):
        PageGroup("g", None, 0)
    with pytest.raises(BadInputError, match="window is 0"):
        PageGroup("g", 0, 4)
