"""Overlap of evaluation and calibration text."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.calibration.overlap import find_overlap, ngram_hashes
from llmopt.errors import BadInputError


def random_document(name, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return name, torch.randint(0, 32_000, (length,), generator=generator)


CALIBRATION = [random_document(f"c{i}", 300, 1_000 + i) for i in range(20)]
CLEAN = [random_document(f"e{i}", 300, i) for i in range(99)]


def test_apart_text_is_kept():
    overlap = find_overlap(CLEAN, CALIBRATION)
    assert overlap.dropped == () and overlap.kept == tuple(range(99)) and overlap.share == 0


def test_a_passage_of_a_calibration_document_drops_its_document():
    mixed = torch.cat([CLEAN[0][1], CALIBRATION[7][1][50:110]])
    overlap = find_overlap([*CLEAN[:50], ("mixed", mixed), *CLEAN[50:]], CALIBRATION)
    assert overlap.dropped == ("mixed",)
    assert overlap.kept == tuple(i for i in range(100) if i != 50)


def test_one_shared_run_in_a_long_document_is_no_leak():
    mixed = torch.cat([CLEAN[0][1], CALIBRATION[7][1][50:65]])
    assert find_overlap([("mixed", mixed)], CALIBRATION).dropped == ()


def test_a_copy_too_short_for_ngrams_is_found():
    short = torch.tensor([1, 2, 3])
    overlap = find_overlap([*CLEAN, ("copy", short.clone())], [*CALIBRATION, ("short", short)])
    assert overlap.dropped == ("copy",)
    assert find_overlap([("other", torch.tensor([1, 2]))], [("short", short)]).dropped == ()


def test_more_than_a_twentieth_is_refused():
    copies = [(f"copy{i}", tokens) for i, (_, tokens) in enumerate(CALIBRATION)]
    assert find_overlap([*CLEAN[:95], *copies[:5]], CALIBRATION).share == 0.05
    with pytest.raises(BadInputError, match=r"6 of 100 .*6\.0%.*copy0, copy1, copy2"):
        find_overlap([*CLEAN[:94], *copies[:6]], CALIBRATION)


def with_template(documents):
    _, template = random_document("template", 60, 5_000)
    return [(name, torch.cat([template, tokens])) for name, tokens in documents]


def test_what_many_calibration_documents_begin_with_is_no_leak():
    calibration = with_template([(name, ids[:40]) for name, ids in CALIBRATION])
    evaluation = with_template([(name, ids[:40]) for name, ids in CLEAN])
    # The first words of a turn are often those of another: 13-grams across the template's end.
    evaluation[5][1][60:70] = calibration[2][1][60:70]
    assert find_overlap(evaluation, calibration).dropped == ()


def test_a_copy_behind_the_template_is_found():
    short = [(name, ids[:40]) for name, ids in CALIBRATION]
    calibration = with_template(short)
    whole = ("whole", calibration[4][1].clone())
    tiny = with_template([("tiny", torch.tensor([7, 8, 9]))])[0]
    part = with_template([("part", torch.cat([CLEAN[50][1], short[9][1]]))])[0]
    bare = ("bare", short[3][1])
    overlap = find_overlap(
        [*with_template(CLEAN), whole, part, bare, ("tiny copy", tiny[1])], [*calibration, tiny]
    )
    assert overlap.dropped == ("whole", "part", "bare", "tiny copy")


def test_what_two_documents_or_copies_of_one_have_is_not_common():
    passage = CALIBRATION[0][1][:60]
    mixed = ("mixed", torch.cat([CLEAN[0][1], passage]))
    copies = [(f"again{i}", CALIBRATION[0][1].clone()) for i in range(5)]
    second = ("second", torch.cat([random_document("s", 300, 9_000)[1], passage]))
    third = ("third", torch.cat([random_document("t", 300, 9_001)[1], passage]))
    evaluation = [*CLEAN, mixed]
    assert find_overlap(evaluation, [*CALIBRATION, *copies, second]).dropped == ("mixed",)
    assert find_overlap(evaluation, [*CALIBRATION, second, third]).dropped == ()
    # Three of three hundred are one per cent, and not more.
    many = [random_document(f"m{i}", 20, 20_000 + i) for i in range(278)]
    assert find_overlap(evaluation, [*CALIBRATION, second, third, *many]).dropped == ("mixed",)


def test_no_calibration_text_overlaps_nothing():
    assert find_overlap(CLEAN, []).dropped == ()


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_hashes_are_equal_exactly_where_the_runs_are(ids, size):
    hashes = ngram_hashes(torch.tensor(ids, dtype=torch.int64), size)
    runs = [tuple(ids[i : i + size]) for i in range(max(0, len(ids) - size + 1))]
    assert hashes.shape == (len(runs),)
    for i in range(len(runs)):
        expected = np.array([run == runs[i] for run in runs])
        assert ((hashes == hashes[i]) == expected).all()
