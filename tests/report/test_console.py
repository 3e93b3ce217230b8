import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from llmopt.report.console import (
    render_contract,
    render_inspection,
    render_summary,
    render_verdict,
)
from llmopt.report.inspection import Inspection, TensorLine
from llmopt.report.schema import Consumer, ContractCheck


def _shown(renderable, width=110):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(
    ("outcome", "words"),
    [("pass", "✓ Passed"), ("fail", "✗ Refused"), ("inconclusive", "? Inconclusive")],
)
def test_the_summary_shows_verdict_sizes_and_path(make_report, outcome, words):
    report = make_report(outcome=outcome)
    text = _shown(render_summary(report, Path("out/demo")))
    assert f"{words}: demo-int4" in text
    assert "out/demo/report.html" in text
    assert "28 quantized, 1 copied, 1 tied" in text
    assert "dropped" not in text
    for criterion in report.verdict.criteria:
        assert f"{criterion.estimate:.4g}"[:4] in text


def test_names_are_not_read_as_console_markup(make_report):
    text = _shown(render_summary(make_report(name="[red]x[/red][link=http://e.vil]y")))
    assert "[red]x[/red][link=http://e.vil]y" in text


def test_a_verdict_alone_shows_its_notes(make_report):
    text = _shown(render_verdict(make_report().verdict, ["changed: model.safetensors [x]"]))
    assert "Passed" in text
    assert "! changed: model.safetensors [x]" in text


def test_a_contract_shows_each_check_and_counts_refusals():
    broken = ContractCheck(name="kernels", passed=False, detail="no 3 bit kernel")
    contract = SimpleNamespace(
        checks=(ContractCheck(name="format", passed=True, detail="holds W3A16"),),
        consumers=(Consumer(name="vllm", version=">=0.20", checks=(broken,)),),
        refusals=("no 3 bit kernel",),
    )
    text = _shown(render_contract(contract))
    assert "✓" in text and "holds W3A16" in text
    assert "✗" in text and "no 3 bit kernel" in text and "vllm >=0.20" in text
    assert "does not hold: 1 refusal." in text
    contract.consumers, contract.refusals = (), ()
    assert "The contract holds." in _shown(render_contract(contract))


def test_an_inspection_sums_by_type_and_lists_on_request():
    tensors = (
        TensorLine("a.weight_packed", "int32", (8, 3), 96),
        TensorLine("a.weight_scale", "bfloat16", (8, 1), 16),
        TensorLine("norm", "bfloat16", (), 2),
    )
    inspection = Inspection(Path("x"), "checkpoint", tensors, schemes={"W4A16 g32": 1})
    text = _shown(render_inspection(inspection))
    assert "3, 114 B" in text and "2, 18 B" in text and "1 layer" in text
    assert "a.weight_packed" not in text
    listed = _shown(render_inspection(inspection, list_tensors=True))
    assert "8 × 3" in listed and "scalar" in listed


def test_an_inspected_artifact_says_what_changed(make_report):
    tensors = (TensorLine("w", "int32", (1,), 4),)
    sound = Inspection(Path("x"), "artifact", tensors, report=make_report())
    assert "every file is as it was gated" in _shown(render_inspection(sound))
    touched = Inspection(
        Path("x"), "artifact", tensors, report=make_report(), changed=("missing: config.json",)
    )
    text = _shown(render_inspection(touched))
    assert "! missing: config.json" in text
    assert "as it was gated" not in text


def test_the_summary_names_the_margins_and_an_inspection_what_it_cannot_read(make_report):
    assert "margins of" not in _shown(render_summary(make_report()))
    assert "margins of 4-bit weights" in _shown(render_summary(make_report(margins_for_bits=4)))
    tensors = (TensorLine("a.qweight", "int32", (8, 3), 96),)
    foreign = Inspection(Path("x"), "checkpoint", tensors, format="gptq", unread="[x] is foreign")
    text = _shown(render_inspection(foreign))
    assert "gptq" in text and "not read: [x] is foreign" in text


def test_the_page_of_a_single_file_lies_in_the_folder_beside_it(make_report, tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    text = _shown(render_summary(make_report(), file), width=400)
    assert str(tmp_path / "model.gguf.llmopt" / "report.html") in text
