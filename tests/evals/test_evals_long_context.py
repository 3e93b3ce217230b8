from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt_evals.cache_evidence import CacheEvidence, check_cache_text, measure_cache_evidence
from llmopt_evals.criteria import Criteria, Criterion, cache_criteria
from llmopt_evals.errors import EvaluationError, NotFiniteError
from llmopt_evals.gate import run_gate
from llmopt_evals.long_context import (
    LongContextOptions,
    context_tokens,
    first_judged,
    join_contexts,
    measure_cache,
)
from llmopt_evals.recall import CHANCE, make_passages, measure_recall, recall_lengths
from llmopt_evals.units import HeldOutText, Unit

VOCABULARY = 200
BOS = 0
OPTIONS = LongContextOptions(max_tokens=512, num_contexts=30, recall_passages=30, recall_pairs=4)


def held_out(num_units: int = 60, tokens: int = 300, bos: int | None = BOS) -> HeldOutText:
    generator = torch.Generator().manual_seed(0)
    head = [] if bos is None else [bos]
    units = []
    for index in range(num_units):
        body = torch.randint(1, VOCABULARY, (tokens,), generator=generator)
        units.append(Unit(f"unit {index}", (torch.cat([torch.tensor(head).long(), body]),)))
    return HeldOutText(tuple(units), num_units, 0, 0, bos)


class Reader:
    """Predicts what followed the last two tokens before, if that lies within its reach."""

    def __init__(self, reach: int, noise: float = 0.0) -> None:
        self.reach, self.noise = reach, noise

    def score(self, sequences: list[Tensor]) -> Reader:
        self.sequences = sequences
        return self

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        tokens = self.sequences[sequence].tolist()
        generator = torch.Generator().manual_seed(sequence)
        noise = torch.randn(len(tokens), VOCABULARY, generator=generator)
        logits = torch.zeros(stop - start, VOCABULARY)
        places: dict[tuple[int, ...], list[int]] = {}
        for row in range(1, stop):
            seen = places.setdefault(tuple(tokens[row - 1 : row + 1]), [])
            for before in seen if row >= start else ():
                if before >= row - self.reach:
                    logits[row - start, tokens[before + 1]] = 5.0
            seen.append(row)
        return logits + self.noise * noise[start:stop]


def test_contexts_share_no_text_and_begin_as_the_units_do() -> None:
    text = held_out()
    contexts = join_contexts(text, 257, 30, seed=3)
    assert {len(context) for context in contexts} == {257} and len(contexts) == 30
    assert all(int(context[0]) == BOS for context in contexts)
    joined = torch.cat([context[1:] for context in contexts])
    every = [tuple(unit.blocks[0][1:].tolist()) for unit in text.units]
    # In another order than the documents', and every stretch of it is a document's.
    assert joined[:300].tolist() != list(every[0])
    assert tuple(joined[:300].tolist()) in every and tuple(joined[300:600].tolist()) in every
    assert torch.equal(contexts[0], join_contexts(text, 257, 30, seed=3)[0])
    assert not torch.equal(contexts[0], join_contexts(text, 257, 30, seed=4)[0])


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (2048, {}, 601),
        (400, {}, 400),
        (None, {"max_tokens": 128}, 128),
        (128, {"max_tokens": 256}, 128),
    ],
)
def test_contexts_are_as_long_as_model_options_and_text_allow(
    model: int | None, options: dict[str, int], expected: int
) -> None:
    given = LongContextOptions(num_contexts=30, **options)
    assert context_tokens(held_out(), model, given) == expected


def test_too_little_text_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"makes 30 contexts of 21 tokens"):
        context_tokens(held_out(30, 20), 2048, OPTIONS)
    with pytest.raises(EvaluationError, match="different tokens, too few for 16 pairs"):
        few = tuple(Unit(u.name, (u.blocks[0] % 12,)) for u in held_out().units)
        options = LongContextOptions(num_contexts=30)
        check_cache_text(HeldOutText(few, 60, 0, 0, BOS), 2048, options, 0)
    with pytest.raises(EvaluationError, match=r"64 tokens is too short to recall 16 pairs"):
        recall_lengths(64, 16)


@pytest.mark.parametrize(
    ("model", "max_tokens", "limit"),
    [(130, 512, "the model"), (4096, 130, "gate.long_context.max_tokens"), (None, 130, "gate")],
)
def test_contexts_that_read_nothing_quantized_are_refused_before_any_scoring(
    model: int | None, max_tokens: int, limit: str
) -> None:
    options = OPTIONS.model_copy(update={"max_tokens": max_tokens})
    # The half that counts begins at position 64: a page of 32 behind a window of 33 is full there.
    assert context_tokens(held_out(), model, options, 64) == 130
    with pytest.raises(EvaluationError, match=rf"130 tokens, as {limit}.* before 65 read") as error:
        check_cache_text(held_out(), model, options, 0, first_quantized=65)
    assert "131 tokens or more" in error.value.remedy
    assert "kv_cache.recent_window" in error.value.remedy
    with pytest.raises(EvaluationError, match="as the held-out text allows"):
        context_tokens(held_out(30, 100), None, OPTIONS, 191)

    class Untouched:
        def score(self, sequences: list[Tensor]) -> Reader:
            raise AssertionError("scored before it was refused")

    with pytest.raises(EvaluationError, match="before 65 read nothing quantized"):
        measure_cache_evidence(
            "int4",
            held_out(),
            context_length=model,
            reference=Untouched(),  # type: ignore[arg-type]
            candidate=Untouched(),  # type: ignore[arg-type]
            sixteen_bit=Untouched(),  # type: ignore[arg-type]
            options=options,
            seed=0,
            progress=lambda label, done, total: None,
            first_quantized=65,
        )


def test_the_position_from_which_contexts_are_refused_is_the_first_that_is_judged() -> None:
    for num_tokens in (130, 131):
        contexts = join_contexts(held_out(), num_tokens, 30, seed=0)
        before = torch.zeros(30, num_tokens, VOCABULARY)
        for position, counts in ((first_judged(num_tokens), True), (63, False)):
            after = before.clone()
            after[:, position, 0] = 3.0
            assert (measure_cache(contexts, Fixed(after), Fixed(before)).kl > 0).all() == counts


class Fixed:
    """Gives the same logits whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        self.all = logits

    def score(self, sequences: list[Tensor]) -> Fixed:
        return self

    def logits(self, sequence: int, start: int, stop: int) -> Tensor:
        return self.all[sequence, start:stop]


def test_the_cache_is_judged_on_the_second_half_of_each_context() -> None:
    contexts = join_contexts(held_out(), 101, 30, seed=0)
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(30, 101, VOCABULARY, generator=generator)
    after = before.clone()
    after[:, :40] += torch.randn(30, 40, VOCABULARY, generator=generator)
    early = measure_cache(contexts, Fixed(after), Fixed(before))
    assert early.kl.sum() == 0 and early.tokens.tolist() == [50.0] * 30
    assert early.buckets()[0][2] > 0.1 and early.buckets()[-1][2] == 0
    late = before.clone()
    late[7, 80] += torch.randn(VOCABULARY, generator=generator)
    found = measure_cache(contexts, Fixed(late), Fixed(before))
    p, q = (torch.log_softmax(x[7, 80].double(), -1) for x in (before, late))
    assert found.kl[7] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert np.delete(found.kl, 7).sum() == 0
    late[2, 60, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="long context 2 near position 0"):
        measure_cache(contexts, Fixed(late), Fixed(before))


@pytest.mark.parametrize("bos", [BOS, None])
def test_every_pair_is_asked_for_once_and_the_answer_follows(bos: int | None) -> None:
    text = held_out(bos=bos)
    for passage in make_passages(text, 200, OPTIONS, seed=5):
        tokens = passage.token_ids.tolist()
        assert len(tokens) == 200
        assert len(set(passage.depths.tolist())) == 4
        for row, choices, depth in zip(
            passage.rows.tolist(), passage.choices.tolist(), passage.depths.tolist(), strict=True
        ):
            assert tokens[row + 1] == choices[0] and len(set(choices)) == 4
            key = tokens[row - 1 : row + 1]
            places = [i for i in range(row - 1) if tokens[i : i + 3] == [*key, choices[0]]]
            assert len(places) == 1  # the pair itself, and nothing else before the question
            share = places[0] / (200 - 24)
            assert depth / 4 - 0.02 <= share < (depth + 1) / 4


def test_who_reads_all_recalls_all_and_who_reads_little_is_told_by_depth() -> None:
    results = measure_recall(held_out(), 400, Reader(400), Reader(150), OPTIONS, seed=0)
    assert [result.num_tokens for result in results] == [50, 100, 200, 400]
    # Now and then two tokens of the text happen to be a key.
    assert all(result.reference_correct.mean() > 0.97 for result in results)
    assert all(result.is_informative for result in results)
    assert results[0].candidate_correct.mean() > 0.97
    far, near = results[3].depths == 0, results[3].depths == 3
    assert results[3].candidate_correct[far].mean() < 0.1  # all logits are equal: none is larger
    assert results[3].candidate_correct[near].mean() > 0.97


def evidence(
    source: Reader, candidate: Reader, noise: float = 0.0, context_length: int = 400
) -> CacheEvidence:
    return measure_cache_evidence(
        "int4",
        held_out(),
        context_length=context_length,
        reference=source,
        candidate=candidate,
        sixteen_bit=Reader(400, noise),
        options=OPTIONS,
        seed=0,
        progress=lambda label, done, total: None,
    )


def gated(cache: CacheEvidence | None, *metrics: str):  # noqa: ANN201
    margins = {"kv_mean_kl": 0.04, "kv_recall_drop": 0.05}
    criteria = [Criterion(metric=metric, margin=margins[metric]) for metric in metrics]  # type: ignore[arg-type]
    asked = Criteria(
        criteria=(Criterion(metric="mean_kl", margin=9.0), *criteria), relative=None, looks=1
    )
    model = Reader(2)
    text = held_out(tokens=40)
    return run_gate(model, model, text=text, criteria=asked, cloze=None, cache=cache).verdict


def test_a_cache_that_forgets_is_refused_and_one_that_does_not_passes() -> None:
    both = ("kv_mean_kl", "kv_recall_drop")
    sound = gated(evidence(Reader(400), Reader(400)), *both)
    assert sound.outcome == "pass" and [c.outcome for c in sound.criteria] == ["pass"] * 3
    assert sound.kv_cache is not None and sound.kv_cache.num_context_tokens == 400
    forgetful = gated(evidence(Reader(400), Reader(150)), *both)
    assert forgetful.outcome == "fail"
    assert {c.name: c.outcome for c in forgetful.criteria}["kv_recall_drop"] == "fail"
    assert forgetful.kv_cache is not None
    longest = forgetful.kv_cache.recall[-1]
    assert longest.depths[0].candidate_accuracy < 0.1 < 0.9 < longest.depths[0].source_accuracy
    noisy = gated(evidence(Reader(400), Reader(400, noise=0.5)), *both)
    assert {c.name: c.outcome for c in noisy.criteria}["kv_mean_kl"] == "fail"


def test_recall_that_the_source_cannot_do_says_nothing() -> None:
    verdict = gated(evidence(Reader(1), Reader(1)), "kv_mean_kl", "kv_recall_drop")
    assert [c.name for c in verdict.criteria] == ["mean_kl", "kv_mean_kl"]
    assert any("kv_recall_drop was not judged" in note for note in verdict.notes)
    assert verdict.kv_cache is not None
    assert not any(length.is_informative for length in verdict.kv_cache.recall)
    partly = gated(evidence(Reader(150), Reader(150)), "kv_recall_drop")
    assert [c.name for c in partly.criteria] == ["mean_kl", "kv_recall_drop"]
    assert any("not informative in passages of 400 tokens" in note for note in partly.notes)


def test_contexts_far_below_the_models_own_are_noted() -> None:
    for own, is_noted in ((1024, False), (1025, True)):
        verdict = gated(evidence(Reader(400), Reader(400), context_length=own), "kv_mean_kl")
        assert verdict.kv_cache is not None and verdict.kv_cache.num_context_tokens == 512
        told = [note for note in verdict.notes if "contexts of 512 tokens" in note]
        assert len(told) == is_noted
        assert all("the model's own 1,025" in note for note in told)


def test_criteria_on_a_cache_need_one() -> None:
    with pytest.raises(EvaluationError, match="the candidate has no quantized cache"):
        gated(None, "kv_mean_kl")


def test_margins_are_fixed_for_every_kind_and_tighter_where_there_are_more_bits() -> None:
    margins = {
        kind: {c.metric: c.margin for c in cache_criteria(kind)} for kind in ("int8", "fp8", "int4")
    }
    assert all(set(m) == {"kv_mean_kl", "kv_recall_drop"} for m in margins.values())
    assert margins["int8"]["kv_mean_kl"] < margins["fp8"]["kv_mean_kl"]
    assert margins["fp8"]["kv_mean_kl"] < margins["int4"]["kv_mean_kl"]
    with pytest.raises(EvaluationError, match="no margins are fixed for a cache of kind int3"):
        cache_criteria("int3")
    assert CHANCE == 0.25
