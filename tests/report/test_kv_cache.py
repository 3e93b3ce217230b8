import re

import pytest

from llmopt.report.card import render_card
from llmopt.report.html import render_html
from llmopt.report.schema import CacheScaleRecord, Report
from llmopt.report.verdict_view import recall_rows, recall_sentence
from llmopt_evals.verdict import CacheResult, PositionBucket, RecallCell, RecallLength


def recall(num_tokens: int, source: float, candidate: float, informative: bool) -> RecallLength:
    cells = tuple(
        RecallCell(
            depth=depth,
            num_items=128,
            source_accuracy=source,
            candidate_accuracy=candidate - 0.01 * depth,
        )
        for depth in range(4)
    )
    return RecallLength(
        num_tokens=num_tokens,
        num_items=512,
        source_accuracy=source,
        candidate_accuracy=candidate,
        is_informative=informative,
        depths=cells,
    )


def cache(*informative: bool) -> CacheResult:
    return CacheResult(
        label="int4, pages of 64, the last 128 in 16 bit",
        num_context_tokens=2048,
        num_contexts=32,
        positions=(
            PositionBucket(start=0, stop=1023, num_tokens=32736, mean_kl=0.000123),
            PositionBucket(start=1023, stop=2047, num_tokens=32768, mean_kl=0.00456),
        ),
        chance=0.25,
        recall=tuple(
            recall(512 * (i + 1), 0.912, 0.874, told) for i, told in enumerate(informative)
        ),
    )


def with_cache(report: Report, kept: CacheResult, scales: bool = False) -> Report:
    verdict = report.verdict.model_copy(update={"kv_cache": kept})
    record = CacheScaleRecord(
        block=0,
        attention="model.layers.0.self_attn",
        largest_key=11.7,
        largest_value=6.87,
        k_scale=0.0262,
        v_scale=0.01535,
    )
    changes = {"verdict": verdict, "cache_scales": (record,) if scales else ()}
    return report.model_copy(update=changes)


@pytest.mark.parametrize("render", [render_card, render_html])
def test_a_report_without_a_quantized_cache_says_nothing_of_one(make_report, render):
    assert "ache of keys and values" not in render(make_report())


@pytest.mark.parametrize("render", [render_card, render_html])
def test_the_cache_its_kl_by_position_and_recall_by_length_and_depth_are_shown(make_report, render):
    page = render(with_cache(make_report(), cache(True, False), scales=True))
    text = " ".join(re.sub(r"<[^>]+>|\|", " ", page).split())
    assert "int4, pages of 64, the last 128 in 16 bit" in text
    assert "1,023 – 2,047" in text and "0.00456" in text
    assert "1,024" in text and "91.2 % → 87.4 %" in text and "91.2 % → 84.4 %" in text
    assert "not informative" in text and "judged" in text
    assert "Lengths at which the source itself is near chance are not judged." in text


def test_scales_are_on_the_page_and_the_card_says_who_reads_them(make_report):
    report = with_cache(make_report(), cache(True), scales=True)
    assert "model.layers.0.self_attn" in render_html(report)
    assert "and its scales from the checkpoint, as vLLM does" in render_card(report)
    own = render_card(with_cache(make_report(), cache(True)))
    assert "(transformers and vLLM keep a 16-bit cache)" in own


def test_recall_that_nobody_can_judge_is_no_pass(make_report):
    report = with_cache(make_report(), cache(False, False))
    assert recall_sentence(report.verdict).startswith("Not informative")
    assert [row.is_informative for row in recall_rows(report.verdict)] == [False, False]
    assert recall_sentence(with_cache(report, cache(True)).verdict) == "Judged at every length."
