"""What people read: the table, the document and the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from bench.decode.made_rows import SETTING, made_report, made_row
from rich.console import Console

from llmopt.bench.decode.agreement import Agreement
from llmopt.bench.decode.page import figures, render_decode_page
from llmopt.bench.decode.rows import DecodeReport, write_decode_json
from llmopt.bench.decode.table import HEADINGS, decode_markdown, render_decode_table, row_cells

REPORT = made_report(
    *(made_row(20.0 * batch, batch=batch) for batch in (1, 4, 16)),
    *(made_row(rate, batch=b, weights="int4") for b, rate in ((1, 50.0), (4, 90.0), (16, 250.0))),
    made_row(15.0, engine="transformers", variant="dynamic"),
    made_row(40.0, engine="llama.cpp", weights="Q4_0", agreement=Agreement(4, 3, 24, 0.062)),
    made_row(90.0, batch=16, context=None),
    made_row(60.0, engine="transformers", variant="continuous", batch=16, context=None),
    made_row(1.0, engine="vllm", status="unavailable", timing=None, reason="no <environment>\nx"),
)


def test_cells_hold_what_the_headings_say() -> None:
    cells = dict(zip(HEADINGS, row_cells(REPORT.rows[1]), strict=True))
    assert cells["tokens/s"] == "80.0 (79.2–80.8)"
    assert cells["floor"] == "200.0"
    assert cells["of floor"] == "0.40"
    assert cells["GB/s"] == "12.0"  # 600 MB a step of four tokens, 20 steps a second
    assert cells["first token s"] == "0.200 (0.100–0.300)"
    assert (cells["token p50 ms"], cells["token p99 ms"]) == ("10.0", "30.0")
    assert cells["peak MiB"] == "1024"
    mixed = dict(zip(HEADINGS, row_cells(REPORT.rows[8]), strict=True))
    assert (mixed["context"], mixed["floor"], mixed["GB/s"]) == ("mixed", "", "")


def test_the_document_says_what_to_enable_and_what_is_missing() -> None:
    text = decode_markdown(REPORT)
    assert "do not enable int4 weights above batch 4 at a context of 128" in text
    assert "llmopt gives 1.50 x the tokens a second of continuous batching" in text
    assert "grown: it computes what its source computes" in text
    assert "vllm, 16-bit, KV 16-bit: unavailable: no <environment> x" in text
    assert "30.0 GB/s, as measured by a sum in float32 with 2 threads" in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(HEADINGS) - 1}


def test_the_terminal_shows_the_same_rows() -> None:
    shown = Console(width=160)
    with shown.capture() as capture:
        shown.print(render_decode_table(REPORT))
    assert "unavailable" in capture.get()
    assert "do not enable int4 weights above batch 4" in capture.get()


def test_every_row_says_that_its_model_is_grown() -> None:
    page, text = render_decode_page(REPORT), decode_markdown(REPORT)
    shown = Console(width=250)
    with shown.capture() as capture:
        shown.print(render_decode_table(REPORT))
    for row in REPORT.rows:
        assert row_cells(row)[0] == f"{row.name} (grown)"
    assert text.count("(grown) |") == page.count("(grown)</td>") == len(REPORT.rows)
    assert capture.get().count("(grown)") == len(REPORT.rows)
    plain = made_row(20.0, is_grown=False)
    assert row_cells(plain)[0] == plain.name


def test_the_terminal_tells_whose_tokens_differ() -> None:
    shown = Console(width=250)
    with shown.capture() as capture:
        shown.print(render_decode_table(REPORT))
    assert "3/4 identical, else from token 25 on" in capture.get()
    failed = made_row(1.0, status="failed", timing=None, agreement=Agreement(4, 3, 24, 0.5, 0.1))
    assert row_cells(failed)[-1] == str(failed.agreement)


def test_the_page_plots_every_context_and_escapes_what_it_is_told() -> None:
    page = render_decode_page(REPORT)
    titles = [figure.title for figure in figures(REPORT)]
    assert titles == [
        "llmopt, context of 128",
        "What a setting is worth, context of 128",
        "All engines, context of 128",
        "16 requests of mixed lengths",
    ]
    assert page.count("<svg") == len(titles)
    assert "<grown>" not in page and "&lt;grown&gt;" in page
    assert "<environment>" not in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)
    HTMLParser().feed(page)
    names = re.findall(r'id="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_a_page_without_numbers_has_no_plots() -> None:
    page = render_decode_page(DecodeReport(SETTING, REPORT.rows[-1:], False))
    assert "<svg" not in page
    assert "Unfinished" in page


def test_the_file_holds_rows_with_device_versions_and_commit(tmp_path: Path) -> None:
    write_decode_json(tmp_path / "decode.json", REPORT, ["said"])
    data = json.loads((tmp_path / "decode.json").read_text())
    row = data["rows"][1]
    assert row["timing"]["tokens_per_s"] == {"p20": 79.2, "p50": 80.0, "p80": 80.8}
    assert row["of_floor"] == 0.4
    assert (row["machine"], row["commit"], row["versions"]) == (
        SETTING.machine,
        "abc",
        {"torch": "2"},
    )
    assert "grown" in row["model"]
    assert data["sentences"] == ["said"]
