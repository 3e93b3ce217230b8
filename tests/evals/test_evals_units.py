import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt_evals.errors import EvaluationError
from llmopt_evals.units import cut_units, documents_from_text


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=12),
    sources=st.integers(1, 5),
    bos=st.sampled_from([None, 999]),
)
def test_tokens_are_kept_in_order(lengths: list[int], sources: int, bos: int | None) -> None:
    numbers = iter(range(100_000))
    documents = [
        (f"s{i % sources}", [next(numbers) + 1000 for _ in range(n)]) for i, n in enumerate(lengths)
    ]
    text = cut_units(documents, min_tokens=8, max_tokens=32, min_units=0, bos_token_id=bos)
    kept = []
    for unit in text.units:
        for block in unit.blocks:
            tokens = block.tolist()
            if bos is not None:
                assert tokens.pop(0) == bos
            assert 8 <= len(tokens) <= 32
            kept += tokens
    assert len(kept) == len(set(kept)) == sum(lengths) - text.num_dropped_tokens
    assert text.num_dropped_tokens < 8


def test_sources_stay_whole_and_short_ones_join_neighbours() -> None:
    documents = [
        ("long", list(range(100))),
        ("a", [1] * 3),
        ("mixed", [2] * 5),
        ("b", [3] * 4),
        ("mixed", [4] * 6),
        ("c", [5] * 2),
        ("d", [6] * 3),
    ]
    text = cut_units(documents, min_tokens=8, max_tokens=32, min_units=1)
    names = [unit.name for unit in text.units]
    assert names == ["long", "mixed", "a + 2 more"]
    assert [len(block) for block in text.units[0].blocks] == [25, 25, 25, 25]
    assert text.units[1].blocks[0].tolist() == [2] * 5 + [4] * 6
    assert text.units[2].blocks[0].tolist() == [1, 1, 1, 3, 3, 3, 3, 5, 5]
    assert (text.num_sources, text.num_joined_sources, text.num_dropped_tokens) == (6, 3, 3)
    assert text.units[0].num_predictions == 96


def test_fewer_than_thirty_units_are_refused() -> None:
    documents = [(str(i), [0] * 256) for i in range(29)]
    with pytest.raises(EvaluationError, match="only 29 units") as caught:
        cut_units(documents)
    assert "more held-out text" in caught.value.remedy
    assert len(cut_units([*documents, ("30", [0] * 256)]).units) == 30


def test_paragraphs_are_documents() -> None:
    found = documents_from_text("a.txt", "one\ntwo\n\n \nthree\n\n\n\nfour\n")
    assert [body for _, body in found] == ["one\ntwo", "three", "four"]
    assert len({name for name, _ in found}) == 3


def test_blocks_are_int64() -> None:
    text = cut_units([("a", [1] * 40)], min_tokens=8, max_tokens=32, min_units=1)
    assert all(block.dtype == torch.int64 for block in text.units[0].blocks)
