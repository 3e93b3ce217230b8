"""The benchmark of GGUF files: rows, what is compared, table, bad inputs, exit codes."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.small_jobs import VOCAB_SIZE, write_job
from typer.testing import CliRunner

from llmopt.bench.environments import frozen_environment
from llmopt.bench.gguf import (
    DEFAULT_TYPES,
    ENTRIES,
    LLAMA_CPP,
    LLMOPT_GGUF,
    FileKind,
    GGUFOptions,
    GGUFReport,
    bench_gguf,
    find_file_kind,
    weighted_error,
)
from llmopt.bench.gguf_source import Prepared, StoredHessians, prepare_source
from llmopt.bench.gguf_table import HEADINGS, gguf_markdown, render_gguf_table, row_cells
from llmopt.bench.measuring import RUNNERS, FileRequest
from llmopt.bench.peers import REQUIREMENTS, Quantizer
from llmopt.bench.quantize import exit_code_of
from llmopt.bench.runners import run_llmopt_gguf
from llmopt.cli import app
from llmopt.errors import BadInputError, ExitCode
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.imatrix import read_imatrix
from llmopt.quantization.ggml.packing import pack_blocks
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES

PLAYED = """
import os, shutil
PACKAGES = ("numpy",)
def quantize(request):
    if request["method"] == "broken":
        raise RuntimeError("cannot do this today")
    assert request["threads"] == 1 and request["file_type"] == 2 and not request["pure"]
    shutil.copy(os.environ["MADE"] if request["method"] == "made" else request["source"],
                request["output"])
    return {"quantize_s": 2.0}
"""


def prepare(folder: Path, architecture: str, num_tokens: int) -> tuple[Path, Prepared]:
    source = write_job(folder, architecture)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB_SIZE, (num_tokens // 32, 32), generator=generator)
    (folder / "prepared").mkdir()
    return source, prepare_source(source, tokens, folder / "prepared")


def request_of(source: Path, prepared: Prepared, kind: FileKind, method: str) -> FileRequest:
    return FileRequest(
        model=str(source),
        source=str(prepared.source),
        imatrix=str(prepared.imatrix),
        hessians=str(prepared.hessians),
        output=str(prepared.source.parent / f"{method}-{kind.name}.gguf"),
        file_type=kind.mixture.file_type,
        pure=kind.pure,
        types={name: chosen.type.name for name, chosen in kind.types(prepared).items()},
        method=method,
        threads=1,
    )


def run_ours(source: Path, prepared: Prepared, kind: FileKind, method: str) -> GGUFFile:
    """llmopt's runner in this process."""
    request = request_of(source, prepared, kind, method)
    assert run_llmopt_gguf.quantize(asdict(request))["quantize_s"] > 0
    return GGUFFile(Path(request.output))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared]:
    return prepare(tmp_path_factory.mktemp("gguf"), "llama", 192)


@pytest.fixture(scope="module")
def options(small: tuple[Path, Prepared], tmp_path_factory: pytest.TempPathFactory) -> GGUFOptions:
    """A quantizer that works, breaks and gives other types; llmopt; one that is not installed."""
    runners = tmp_path_factory.mktemp("runners")
    (runners / "run_played.py").write_text(PLAYED, "utf-8")
    source, prepared = small
    made = run_ours(source, prepared, find_file_kind("Q4_0"), "least-squares").path
    played = Quantizer("played", "run_played", {}, variables={"MADE": str(made)})
    return GGUFOptions(
        model=source,
        output=runners / "report.json",
        kinds=(find_file_kind("Q4_0"),),
        num_samples=2,
        length=48,
        threads=1,
        repeats=2,
        held_out_tokens=512,
        entries=(
            (replace(LLAMA_CPP, environment="absent"), "imatrix"),
            (LLMOPT_GGUF, "gptq"),
            (played, "made"),
            (played, "broken"),
            (played, "other"),
        ),
        runners=runners,
    )


@pytest.fixture(scope="module")
def report(options: GGUFOptions) -> GGUFReport:
    return bench_gguf(options)


def test_rows_say_what_became_of_each_quantizer(report: GGUFReport) -> None:
    assert [(row.run.quantizer, row.run.method, row.run.status) for row in report.rows] == [
        ("llama.cpp", "imatrix", "unavailable"),
        ("llmopt", "gptq", "measured"),
        ("played", "made", "measured"),
        ("played", "broken", "failed"),
        ("played", "other", "failed"),
    ]
    absent, ours, made, broken, other = report.rows
    assert "absent.txt" in absent.run.reason
    assert "cannot do this today" in broken.run.reason
    assert "is F32, not Q4_0" in other.run.reason
    for row in (ours, made):
        assert row.run.scheme == "Q4_0" and row.run.repeats == 2
        assert row.run.quality is not None and row.run.quality.kl > 0
        assert row.weighted_error is not None and 0.01 < row.weighted_error < 0.2
        assert row.run.size_bytes is not None and row.run.size_bytes < report.f32_bytes
    assert made.rate is not None and made.rate.p50 == report.f32_bytes / 2e6


def test_the_report_on_disk_is_the_report(report: GGUFReport, options: GGUFOptions) -> None:
    data = json.loads(options.output.read_text("utf-8"))
    assert data["complete"] and len(data["rows"]) == 5
    assert data["setting"]["threads"] == 1 and data["setting"]["num_samples"] == 2
    assert data["rows"][1]["weighted_error"] == report.rows[1].weighted_error
    assert data["rows"][2]["run"]["quantize_s"] == {"p20": 2.0, "p50": 2.0, "p80": 2.0}
    assert data["rows"][2]["run"]["versions"].keys() == {"numpy", "torch"}


def test_tables_have_every_row_and_the_reasons(report: GGUFReport) -> None:
    assert all(len(row_cells(row)) == len(HEADINGS) for row in report.rows)
    text = gguf_markdown(report)
    assert "| Q4_0 | llama.cpp | imatrix | unavailable |" in text
    assert "| Q4_0 | played | made | 2.00 |" in text
    assert "played broken: failed: " in text and "cannot do this today" in text
    assert "1 threads" in text and "medians of 2" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_gguf_table(report))
    shown = console.export_text()
    assert "unavailable" in shown and "cannot do this today" in shown


def test_exit_codes_tell_broken_from_absent(report: GGUFReport) -> None:
    absent, ours, _, broken, _ = (row.run for row in report.rows)
    parts = (ours,), (ours, absent), (ours, absent, broken)
    codes = [exit_code_of(rows) for rows in parts]
    assert codes == [ExitCode.PASS, ExitCode.INCONCLUSIVE, ExitCode.FAIL]


def test_least_squares_has_the_least_weighted_error_and_gptq_uses_its_moments(
    small: tuple[Path, Prepared],
) -> None:
    source, prepared = small
    kind = find_file_kind("Q4_0")
    files = {
        method: run_ours(source, prepared, kind, method)
        for method in ("compatible", "least-squares", "gptq")
    }
    errors = {method: weighted_error(prepared, file) for method, file in files.items()}
    assert errors["least-squares"] < errors["compatible"] < errors["gptq"]
    name = "blk.0.ffn_down.weight"
    assert len(StoredHessians(prepared.hessians).of(name)) == 1
    assert not torch.equal(files["gptq"].data(name), files["least-squares"].data(name))
    assert torch.equal(
        files["gptq"].data("token_embd.weight"), files["least-squares"].data("token_embd.weight")
    )


def test_the_weighted_error_is_its_definition(small: tuple[Path, Prepared]) -> None:
    source, prepared = small
    output = run_ours(source, prepared, find_file_kind("Q8_0"), "compatible")
    from gguf import GGUFReader, dequantize

    plain = {tensor.name: tensor.data for tensor in GGUFReader(prepared.source).tensors}
    expected = []
    importances = read_imatrix(prepared.imatrix).entries
    for tensor in GGUFReader(output.path).tensors:
        if tensor.name not in importances:
            continue
        importance = importances[tensor.name].importance().numpy()
        lost = dequantize(tensor.data, tensor.tensor_type) - plain[tensor.name]
        whole = (importance * plain[tensor.name] ** 2).sum()
        expected.append(math.sqrt((importance * lost**2).sum() / whole))
    assert len(expected) == len(importances) > 7
    found = weighted_error(prepared, output)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_every_expert_has_its_importance_and_its_moments(tmp_path: Path) -> None:
    source, prepared = prepare(tmp_path, "mixtral", 32)
    name = "blk.0.ffn_down_exps.weight"
    entry = read_imatrix(prepared.imatrix).entries[name]
    hessians = StoredHessians(prepared.hessians).of(name)
    assert len(hessians) == len(entry.counts) > 1
    for hessian, count, importance in zip(hessians, entry.counts, entry.importance(), strict=True):
        assert (hessian is None) == (int(count) == 0)
        if hessian is not None:
            assert torch.allclose(hessian.diagonal() / 2, importance, rtol=1e-5)
    output = run_ours(source, prepared, find_file_kind("Q4_0"), "gptq")
    assert 0 < weighted_error(prepared, output) < 0.3


def test_a_bare_type_is_that_of_every_matrix(small: tuple[Path, Prepared]) -> None:
    prepared = small[1]
    mixture, bare = find_file_kind("Q4_K_M"), find_file_kind("Q4_K")
    assert not mixture.pure and bare.pure
    wanted = {chosen.wanted.name for chosen in bare.types(prepared).values()}
    assert wanted == {"Q4_K", "F32"}
    assert {chosen.wanted.name for chosen in mixture.types(prepared).values()} > wanted
    # Rows of 32 or 64 make up no block of 256.
    assert all(c.is_fallback for c in bare.types(prepared).values() if c.wanted.name == "Q4_K")


def test_every_quantizer_has_its_script_and_its_environment() -> None:
    assert all((RUNNERS / f"{quantizer.module}.py").is_file() for quantizer, _ in ENTRIES)
    assert LLAMA_CPP.environment is not None
    content = frozen_environment(LLAMA_CPP.environment, REQUIREMENTS).content
    assert "llama_cpp_python==" in content
    assert [find_file_kind(name).name for name in DEFAULT_TYPES] == list(DEFAULT_TYPES)


def test_bad_inputs_are_told_before_any_work(
    options: GGUFOptions, report: GGUFReport, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="exists"):
        bench_gguf(options)
    fresh = replace(options, output=tmp_path / "report.json")
    with pytest.raises(BadInputError, match="nowhere"):
        bench_gguf(replace(fresh, model=tmp_path / "nowhere"))
    assert not fresh.output.exists()
    with pytest.raises(BadInputError, match="Q4_K_M"):
        find_file_kind("q4_k_m")
    with pytest.raises(BadInputError, match="F16 is not quantized"):
        find_file_kind("F16")


def test_the_command_line_names_the_nearest_type(tmp_path: Path) -> None:
    arguments = ["bench", "gguf", "--type", "Q4_KM", "-o", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, BadInputError)
    assert "Q4_K_M" in result.exception.remedy or "Q4_K_M" in result.exception.what


def test_nearest_has_a_row_where_only_importance_makes_llama_cpp_search() -> None:
    has = {name: find_file_kind(name).has_row("nearest") for name in ("Q4_0", "Q5_1", "Q8_0")}
    assert has == {"Q4_0": True, "Q5_1": True, "Q8_0": False}
    assert not any(find_file_kind(name).has_row("nearest") for name in ("Q4_K_M", "IQ4_NL"))
    assert all(find_file_kind(name).has_row("compatible") for name in ("Q4_0", "Q8_0", "Q4_K_M"))


def test_nearest_rounds_without_importance(small: tuple[Path, Prepared]) -> None:
    source, prepared = small
    kind, name = find_file_kind("Q4_0"), "blk.0.attn_q.weight"
    values = GGUFFile(prepared.source).data(name).view(torch.float32)
    plain = pack_blocks(quantize_blocks(values, GGML_TYPES["Q4_0"], search="compatible"))
    found = {
        method: run_ours(source, prepared, kind, method).data(name)
        for method in ("nearest", "compatible")
    }
    assert torch.equal(found["nearest"], plain)
    assert not torch.equal(found["compatible"], plain)
