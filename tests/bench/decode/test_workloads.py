"""Requests that every engine gets."""

from __future__ import annotations

import pytest

from llmopt.bench.decode import workloads
from llmopt.bench.decode.workloads import (
    CHECK,
    MIXED,
    MIXED_REQUESTS,
    Workload,
    plan_workloads,
    token_stream,
)
from llmopt.calibration.documents import Document
from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.demo.paths import demo_model_path
from llmopt.errors import BadInputError

STREAM = [(7 * place) % 4093 for place in range(30_000)]


def test_cells_have_the_batches_and_contexts_asked_for() -> None:
    loads = {load.name: load for load in plan_workloads(STREAM, (1, 4), (32, 64), 8, 3, 2048)}
    assert list(loads) == [CHECK, "1x32", "4x32", "1x64", "4x64", MIXED]
    cell = loads["4x64"]
    assert [len(prompt) for prompt in cell.prompts] == [64] * 4
    assert cell.new_tokens == (8,) * 4
    assert (cell.repeats, cell.warm_ups) == (3, 1)
    assert cell.longest == 72
    assert cell.mean_context == 68
    assert loads[CHECK].wants_gaps and not cell.wants_gaps


def test_no_two_prompts_begin_alike_even_when_the_text_is_used_twice() -> None:
    loads = plan_workloads(STREAM[:3000], (16,), (256,), 8, 1, 2048)
    starts = [prompt[:8] for load in loads if load.name == "16x256" for prompt in load.prompts]
    assert len(set(starts)) == 16


def test_mixed_requests_keep_to_the_models_context() -> None:
    for longest in (300, 4096):
        mixed = plan_workloads(STREAM, (1,), (32,), 8, 1, longest)[-1]
        lengths = [len(prompt) for prompt in mixed.prompts]
        assert mixed.batch == MIXED_REQUESTS
        assert mixed.longest <= longest
        assert max(lengths) > 4 * min(lengths)
        assert len(set(mixed.new_tokens)) > 8


@pytest.mark.parametrize(
    ("longest", "contexts", "lengths"),
    [
        (2048, (32, 700), [17, 64, 130, 200, 700]),
        (None, (5000,), [17, 64, 130, 200, 1024]),
        (150, (32,), [17, 64, 118]),
    ],
)
def test_the_check_asks_for_the_longest_context_measured_within_bounds(
    longest: int | None, contexts: tuple[int, ...], lengths: list[int]
) -> None:
    check = plan_workloads(STREAM, (1,), contexts, 8, 1, longest)[0]
    assert check.name == CHECK
    assert [len(prompt) for prompt in check.prompts] == lengths
    assert longest is None or check.longest <= longest


@pytest.mark.parametrize("longest", [40, 128, 144])
def test_a_context_that_leaves_mixed_requests_no_prompts_is_refused(longest: int) -> None:
    with pytest.raises(BadInputError, match="no prompts of more than 16") as error:
        plan_workloads(STREAM, (1,), (16,), 8, 1, longest)
    assert "more than 144" in error.value.remedy
    mixed = plan_workloads(STREAM, (1,), (16,), 8, 1, 145)[-1]
    assert min(map(len, mixed.prompts)) >= 16 and mixed.longest <= 145


def test_a_model_without_a_context_has_mixed_requests_of_every_length() -> None:
    mixed = plan_workloads(STREAM, (1,), (16,), 8, 1, None)[-1]
    assert 512 < max(map(len, mixed.prompts)) <= 1024


def test_a_single_new_token_is_refused() -> None:
    with pytest.raises(BadInputError, match="1 new tokens") as error:
        plan_workloads(STREAM, (1,), (16,), 1, 1, 2048)
    assert "2 or more" in error.value.remedy


def test_a_context_longer_than_the_text_is_refused() -> None:
    with pytest.raises(BadInputError, match="shorter contexts"):
        plan_workloads(STREAM, (1,), (40_000,), 8, 1, 2048)


def test_the_mean_context_is_weighted_by_steps() -> None:
    load = Workload("x", ((1,) * 10, (1,) * 100), (30, 10))
    assert load.mean_context == (25 * 30 + 105 * 10) / 40


def test_the_stream_is_of_the_models_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def documents(source: str, *, split: str, tokenizer: object) -> list[Document]:
        asked.append((source, split))
        return [Document("one", "A list of words."), Document("two", "More of them.")]

    monkeypatch.setattr(workloads, "read_documents", documents)
    stream = token_stream(demo_model_path())
    assert asked == [("builtin", "evaluation")]
    tokenizer = load_tokenizer(demo_model_path()).tokenizer
    assert tokenizer.decode(stream) == "A list of words.More of them."
