"""What the report of a conversion says is true of the files beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.quantized import write_quantized

from llmopt.checkpoint.journal import file_sha256
from llmopt.converting import convert
from llmopt.errors import BadInputError, Outcome
from llmopt.formats import FORMATS
from llmopt.quantization.scheme import Scheme
from llmopt.report.conversion import ConversionReport
from llmopt.report.json_file import write_json
from llmopt.report.schema import Report


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of AWQ files, from nobody."""
    folder = tmp_path / "source"
    write_quantized(folder, FORMATS["awq"], lambda _: Scheme(4, 32, symmetric=False))
    return folder


def read_report(folder: Path) -> ConversionReport:
    return ConversionReport.model_validate_json((folder / "conversion.json").read_text("utf-8"))


def expect_true_hashes(folder: Path) -> None:
    own = {"conversion.json", "README.md"}
    files = {path.name: file_sha256(path) for path in folder.iterdir() if path.name not in own}
    assert {name: known.sha256 for name, known in read_report(folder).files.items()} == files


def test_a_chain_of_conversions(source: Path, tmp_path: Path) -> None:
    convert(source, "gptq", tmp_path / "one")
    convert(tmp_path / "one", "compressed-tensors", tmp_path / "two")
    expect_true_hashes(tmp_path / "one")
    expect_true_hashes(tmp_path / "two")
    report = read_report(tmp_path / "two")
    assert (report.source.name, report.source.format) == ("one", "gptq")
    left_out = {left.file: left.reason for left in report.companions.left_out}
    assert left_out["conversion.json"] == "a report on the source"


@pytest.mark.parametrize("outcome", ["pass", "inconclusive"])
def test_the_verdict_on_the_source_is_told(
    outcome: Outcome, source: Path, tmp_path: Path, make_report: Callable[..., Report]
) -> None:
    write_json(make_report(outcome=outcome), source)
    convert(source, "compressed-tensors", tmp_path / "out")
    assert read_report(tmp_path / "out").source.gated == outcome
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert f"llmopt judged the source: {outcome}." in card
    assert not (tmp_path / "out/llmopt.json").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "nothing", '{"schema_version": 1}', "99"])
def test_a_verdict_that_cannot_be_read_is_refused_before_any_work(
    text: str, source: Path, tmp_path: Path
) -> None:
    (source / "llmopt.json").write_text(text)
    with pytest.raises(BadInputError, match=r"llmopt\.json") as caught:
        convert(source, "compressed-tensors", tmp_path / "out")
    assert "move it away" in caught.value.remedy
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
