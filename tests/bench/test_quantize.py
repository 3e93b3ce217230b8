"""The whole benchmark with played quantizers: rows, journal, table, bad inputs, exit codes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench.conftest import Made
from rich.console import Console
from typer.testing import CliRunner

import llmopt.bench.quantize as bench
from llmopt.bench.floor import MatrixRate
from llmopt.bench.peers import Quantizer
from llmopt.bench.quantize import (
    BenchOptions,
    Entry,
    bench_quantize,
    exit_code,
    plan_entries,
    scheme_name,
)
from llmopt.bench.rows import BenchReport, Row, spread
from llmopt.bench.table import HEADINGS, markdown_table, render_table, table_rows
from llmopt.cli import app
from llmopt.errors import BadInputError, ExitCode

RATE = MatrixRate(1e11, 4e11, threads=1)  # measuring it takes seconds

PLAYED = """
import os, shutil
PACKAGES = ("numpy",)
def quantize(request):
    if request["method"] == "awq":
        raise RuntimeError("cannot do awq today")
    assert len(request["token_ids"]) == 2 and len(request["token_ids"][0]) == 48
    shutil.copytree(os.environ["MADE"], request["output"])
    return {"quantize_s": 2.0, "phases_s": {"solve": 1.25}}
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, made: Made) -> BenchOptions:
    """One quantizer that works for gptq and breaks for awq, one that cannot be installed."""
    runners = tmp_path_factory.mktemp("runners")
    (runners / "run_played.py").write_text(PLAYED, "utf-8")
    works = Quantizer(
        "works", "run_played", {"gptq": True, "awq": False}, variables={"MADE": str(made.output)}
    )
    absent = Quantizer("absent", "run_absent", {"gptq": True}, environment="absent")
    return BenchOptions(
        model=made.source,
        output=runners / "report.json",
        methods=("gptq",),
        peers=(works, absent),
        num_samples=2,
        length=48,
        threads=1,
        held_out_tokens=512,
        runners=runners,
    )


@pytest.fixture(scope="module")
def report(played: BenchOptions) -> BenchReport:
    """The benchmark without llmopt's own rows, whose processes would take a minute here."""
    with pytest.MonkeyPatch.context() as patch:
        works, absent = played.peers
        entries = [Entry(works, "gptq"), Entry(absent, "gptq"), Entry(works, "awq")]
        patch.setattr(bench, "plan_entries", lambda _options: entries)
        patch.setattr(bench, "measure_matrix_rate", lambda threads: RATE)
        return bench_quantize(played)


def test_rows_say_what_became_of_each_quantizer(report: BenchReport) -> None:
    assert [(row.quantizer, row.method, row.status) for row in report.rows] == [
        ("works", "gptq", "measured"),
        ("absent", "gptq", "unavailable"),
        ("works", "awq", "failed"),
    ]
    measured, absent, broken = report.rows
    assert measured.scheme == "W4A16 g128 sym"
    assert measured.quality is not None and measured.quality.kl > 0
    assert measured.size_bytes is not None and measured.size_bytes > 1000
    assert measured.phases_s == {"solve": 1.25}
    assert "absent.txt" in absent.reason
    assert "cannot do awq today" in broken.reason


def test_the_report_on_disk_is_the_report(report: BenchReport, played: BenchOptions) -> None:
    data = json.loads(played.output.read_text("utf-8"))
    assert data["complete"] and len(data["rows"]) == 3
    assert data["floor"]["mixed_s"] == report.floor.mixed_s > 0
    assert data["setting"]["num_samples"] == 2
    assert data["rows"][0]["quantize_s"] == {"p20": 2.0, "p50": 2.0, "p80": 2.0}


def test_each_row_is_on_disk_when_it_is_done(
    played: BenchOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = replace(played, output=tmp_path / "report.json")
    entries = [Entry(played.peers[1], "gptq")] * 2
    monkeypatch.setattr(bench, "plan_entries", lambda _options: entries)
    monkeypatch.setattr(bench, "measure_matrix_rate", lambda threads: RATE)
    done: list[int] = []

    def interrupt(*_arguments: object) -> Row:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return Row("absent", "gptq", "W4A16", "unavailable", reason="so")

    monkeypatch.setattr(bench, "_row", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench_quantize(options)
    data = json.loads(options.output.read_text("utf-8"))
    assert not data["complete"] and [row["reason"] for row in data["rows"]] == ["so"]


def test_tables_have_every_row_and_the_reasons(report: BenchReport) -> None:
    assert all(len(cells) == len(HEADINGS) for cells in table_rows(report))
    text = markdown_table(report)
    assert "| works | gptq | W4A16 g128 sym | 2.0 |" in text
    assert "works awq: failed: " in text and "cannot do awq today" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_table(report))
    shown = console.export_text()
    assert "works" in shown and "unavailable" in shown and "cannot do awq today" in shown


def test_peers_stand_beside_llmopt_in_what_they_can(played: BenchOptions) -> None:
    entries = plan_entries(replace(played, recipes=("int3-gptq", "int4-gptq")))
    assert [(entry.name, entry.method) for entry in entries] == [
        ("llmopt", "rtn"),
        ("llmopt", "gptq"),
        ("llmopt int3-gptq", "gptq"),
        ("works", "gptq"),
        ("absent", "gptq"),
    ]


def test_a_recipe_of_llmopt_brings_its_own_scheme(played: BenchOptions) -> None:
    options = replace(played, methods=("gptq", "awq"), recipes=("int4-gptq-g32", "int4-awq-gptq"))
    found = [
        (entry.name, entry.method, scheme_name(entry.scheme)) for entry in plan_entries(options)
    ]
    assert ("llmopt int4-gptq-g32", "gptq", "W4A16 g32 sym") in found
    assert ("llmopt int4-awq-gptq", "gptq", "W4A16 g128 sym") in found
    assert ("llmopt", "awq", "W4A16 g128 asym") in found
    assert ("works", "awq", "W4A16 g128 asym") in found


def test_exit_codes_tell_broken_from_absent(report: BenchReport) -> None:
    measured, absent, broken = report.rows
    parts = (measured,), (measured, absent), (measured, absent, broken)
    codes = [exit_code(replace(report, rows=rows)) for rows in parts]
    assert codes == [ExitCode.PASS, ExitCode.INCONCLUSIVE, ExitCode.FAIL]


def test_spread_interpolates_between_repeats() -> None:
    found = spread([10.0, 30.0, 20.0])
    assert (found.p20, found.p50, found.p80) == (14.0, 20.0, 26.0)
    assert spread([7]).p20 == spread([7]).p80 == 7.0


def test_bad_inputs_are_told_before_any_work(
    played: BenchOptions, report: BenchReport, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="exists"):
        bench_quantize(played)
    with pytest.raises(BadInputError, match="is not a directory"):
        bench_quantize(replace(played, output=tmp_path / "none" / "report.json"))
    fresh = replace(played, output=tmp_path / "report.json")
    with pytest.raises(BadInputError, match="nowhere"):
        bench_quantize(replace(fresh, model=tmp_path / "nowhere"))
    with pytest.raises(BadInputError, match="no-such-recipe"):
        bench_quantize(replace(fresh, recipes=("no-such-recipe",)))
    assert not fresh.output.exists()


def test_the_command_line_names_the_nearest_peer(tmp_path: Path) -> None:
    arguments = ["bench", "quantize", "--peer", "gptq-model", "-o", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, BadInputError)
    assert "gptqmodel" in result.exception.what
