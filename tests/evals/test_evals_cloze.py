import pytest
import torch

from llmopt_evals.cloze import ClozeOptions, is_correct, make_items
from llmopt_evals.errors import EvaluationError
from llmopt_evals.units import Unit

OPTIONS = ClozeOptions(num_items=40, context_tokens=6, continuation_tokens=3)


def numbered_units(bos: int | None = None) -> list[Unit]:
    """Every token occurs once, so its value says where it was taken from."""
    head = [] if bos is None else [bos]
    return [
        Unit(
            f"u{u}",
            tuple(torch.tensor([*head, *range(s, s + 60)]) for s in (1000 * u, 1000 * u + 500)),
        )
        for u in range(1, 5)
    ]


@pytest.mark.parametrize("bos", [None, 7])
def test_items_are_distinct_and_from_one_unit(bos: int | None) -> None:
    items = make_items(numbered_units(bos), 40, OPTIONS, least=40, seed=1, bos_token_id=bos)
    assert len(items) == 40
    truths = set()
    for item in items:
        context = item.branches.context.tolist()
        if bos is not None:
            assert context.pop(0) == bos
        truth = item.branches.continuations[item.answer].tolist()
        assert context + truth == list(range(context[0], context[0] + 9))
        texts = [continuation.tolist() for continuation in item.branches.continuations]
        everything = context + [token for text in texts for token in text]
        assert len(everything) == len(set(everything)) == 6 + 4 * 3, "texts overlap"
        assert {token // 1000 for token in everything} == {item.unit + 1}
        assert not truths & set(truth), "true continuations overlap"
        truths |= set(truth)
    assert len({item.answer for item in items}) == 4


def test_equal_choices_are_never_offered() -> None:
    units = [Unit("u", (torch.tensor([1, 2, 3] * 40),))]
    assert make_items(units, 5, OPTIONS, least=0, seed=0) == []  # three texts, four choices


def test_the_seed_decides() -> None:
    first, again, other = (
        [
            (item.unit, item.answer, item.branches.context.tolist())
            for item in make_items(numbered_units(), 20, OPTIONS, least=20, seed=seed)
        ]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_too_short_a_text() -> None:
    with pytest.raises(EvaluationError, match="only 144 cloze items.*needs 200"):
        make_items(numbered_units(), 200, OPTIONS, least=200, seed=0)


def test_the_largest_sum_wins() -> None:
    item = make_items(numbered_units(), 1, OPTIONS, least=1, seed=0)[0]
    logprobs = torch.full((4,), -9.0)
    logprobs[item.answer] = -8.0
    assert is_correct(item, logprobs, "candidate")
    logprobs[(item.answer + 1) % 4] = -7.0
    assert not is_correct(item, logprobs, "candidate")
    logprobs[0] = float("nan")
    with pytest.raises(EvaluationError, match="NaN"):
        is_correct(item, logprobs, "candidate")
