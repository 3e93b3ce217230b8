"""The whole road to one GGUF file, on a model of random weights."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_jobs import WIDTHS, gguf_recipe, write_wide_job
from support.small_jobs import small_recipe, write_job, write_text

from llmopt import reporting
from llmopt.checkpoint.placement import companion_folder
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.comparison import compare_gguf
from llmopt.errors import AlreadyConcludedError, BadInputError, ExitCode, RoundTripError
from llmopt.evaluation import evaluate
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.record import read_verdict
from llmopt.formats.gguf.source import GGUFSource
from llmopt.imatrix import gather_imatrix
from llmopt.inspection import inspect_path
from llmopt.pipeline import Result, quantize
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES
from llmopt.recipe import load_recipe, recipe_files
from llmopt.report.failure import FAILURE_NAME, Failure
from llmopt.report.json_file import read_json

GGUF_RECIPES = [name for name in sorted(recipe_files()) if name.startswith("gguf-")]


class _StopError(Exception):
    pass


def stop_at(task: str, number: int) -> Callable[[str, int, int], None]:
    def progress(found: str, completed: int, _: int) -> None:
        if found == task and completed == number:
            raise _StopError

    return progress


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_job(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> Result:
    result = quantize(source, gguf_recipe(text), tmp_path_factory.mktemp("out") / "model.gguf")
    assert result.published and result.exit_code is ExitCode.PASS
    return result


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes as long as the rest."""
    monkeypatch.setattr(reporting, "write_html", lambda *_: None)


def test_the_file_has_its_verdict_inside_and_its_report_beside(published: Result) -> None:
    path, report = published.path, published.report
    folder = companion_folder(path)
    assert {p.name for p in path.parent.iterdir()} == {"model.gguf", "model.gguf.llmopt"}
    assert {"llmopt.json", "README.md", "report.html", "recipe.yaml", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert read_json(folder / "llmopt.json") == report
    verdict = read_verdict(GGUFFile(path))
    assert verdict is not None and verdict["outcome"] == "pass"
    file = report.gguf
    assert file is not None and file.num_bytes == path.stat().st_size
    assert file.architecture == "llama" and file.pre_tokenizer == "gpt-2"
    assert file.types["F32"] == 5 and file.importance == "calibration" and file.num_weighed == 15
    assert [t.name for t in file.tensors if t.weighed is False and t.type != "F32"] == [
        "token_embd.weight"
    ]
    assert not file.fallbacks and 4.5 < report.sizes.bits_per_weight < 6.5
    assert report.files["model.gguf"].num_bytes == path.stat().st_size
    assert load_recipe(folder / "recipe.yaml").sha256() == report.recipe.sha256


def test_every_source_tensor_has_a_fate(published: Result, source: Path) -> None:
    report = published.report
    fates = {entry.name: (str(entry.fate), entry.reason) for entry in report.ledger.entries}
    assert set(fates) == set(open_checkpoint(source).names)
    assert fates["model.embed_tokens.weight"] == ("quantized", "Q4_K by rtn")
    assert fates["lm_head.weight"] == ("quantized", "Q6_K by rtn, by importance")
    assert fates["model.norm.weight"] == ("copied", "as F32")
    assert report.round_trip.num_tensors == len(GGUFFile(published.path).names) == 21
    assert report.margins_for_bits == 4 and len(report.layers) == 16
    assert all(layer.num_tokens == 384 for layer in report.layers if layer.block is not None)


def test_card_page_and_console_say_what_the_tensors_became(published: Result) -> None:
    from rich.console import Console

    from llmopt.report.console import render_inspection, render_summary

    folder = companion_folder(published.path)
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    for words in (card, page):
        assert "Q4_K" in words and "llama.cpp" in words and "calibration" in words
    assert "blk.0.ffn_down.weight" in page
    assert "library_name: gguf" in card and "llmopt serve model.gguf" in card
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_summary(published.report, published.path))
    console.print(render_inspection(inspect_path(published.path)))
    shown = console.export_text()
    assert "Q4_K_M: " in shown and "calibration, of 15 tensors" in shown
    assert "as their hash says" in shown and "general.architecture" in shown


def test_values_are_near_the_sources_and_norms_are_equal(published: Result, source: Path) -> None:
    before, after = open_checkpoint(source), GGUFSource(published.path)
    assert set(before.names) == set(after.names)
    for name in before.names:
        old, new = before.read(name).float(), after.read(name)
        if "norm" in name:
            assert torch.equal(old, new)
        else:
            assert 0 < (old - new).norm() < 0.1 * old.norm()


def test_what_is_evaluated_later_is_what_was_published(
    published: Result, source: Path, text: Path
) -> None:
    recipe = gguf_recipe(text)
    again = evaluate(published.path, source, recipe=recipe, text=str(text))
    assert again.exit_code is ExitCode.PASS
    assert again.notes == ("measured on another text than when it was gated",)
    comparison = compare_gguf(published.path, open_checkpoint(source))
    assert comparison.bits == 4 and len(comparison.schemes) == 16
    assert comparison.schemes["lm_head.weight"] == GGML_TYPES["Q6_K"]


def test_a_changed_byte_is_seen(
    published: Result, source: Path, text: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.gguf"
    data = bytearray(published.path.read_bytes())
    data[-40] ^= 1
    changed.write_bytes(data)
    seen = inspect_path(changed)
    assert seen.intact is False and seen.report is None
    assert seen.verdict == "pass, of other tensors than it holds now"
    assert inspect_path(published.path).intact and not inspect_path(published.path).changed
    notes = evaluate(changed, source, recipe=gguf_recipe(text), text=str(text)).notes
    assert any("are not those that llmopt wrote" in note for note in notes)


def test_what_fails_is_shelved_where_nobody_serves_it(
    tmp_path: Path, source: Path, text: Path, no_page: None
) -> None:
    recipe = gguf_recipe(text, gate={"margins": {"mean_kl": 1e-9}})
    result = quantize(source, recipe, tmp_path / "model.gguf")
    assert not result.published and result.exit_code is ExitCode.FAIL
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf.quarantine"]
    (file,) = result.path.glob("*.quarantined")
    verdict = read_verdict(GGUFFile(file))
    assert verdict is not None and verdict["outcome"] == "fail"
    assert inspect_path(file).verdict == "fail"


def test_a_file_that_does_not_hold_what_was_solved_never_gets_that_far(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.targets.gguf import target

    original = target.pack_blocks

    def swap_nibbles(tensor: Any) -> torch.Tensor:
        packed = original(tensor)
        return packed if tensor.type.name != "Q6_K" else packed.roll(1, dims=1)

    monkeypatch.setattr(target, "pack_blocks", swap_nibbles)
    with pytest.raises(RoundTripError, match="output.weight"):
        quantize(source, gguf_recipe(text), tmp_path / "model.gguf")
    (file,) = tmp_path.glob("*.quarantine/*.quarantined")
    verdict = read_verdict(GGUFFile(file))
    assert verdict is not None and verdict["outcome"] == "fail"
    failure = Failure.model_validate_json((file.parent / FAILURE_NAME).read_text())
    assert failure.stage == "round trip" and "model.gguf" in failure.files


@pytest.mark.parametrize(
    ("task", "number"), [("quantize", 1), ("quantize", 2), ("assemble", 9), ("read back", 5)]
)
def test_a_run_that_stopped_anywhere_resumes_to_the_same_tensors(
    task: str,
    number: int,
    tmp_path: Path,
    source: Path,
    text: Path,
    published: Result,
    no_page: None,
) -> None:
    output = tmp_path / "model.gguf"
    with pytest.raises(_StopError):
        quantize(source, gguf_recipe(text), output, progress=stop_at(task, number))
    assert not output.exists() and not companion_folder(output).exists()
    with pytest.raises(_StopError):  # the gate is the road's longest part, and not what is asked
        quantize(
            source, gguf_recipe(text), output, resume=True, progress=stop_at("score the source", 0)
        )
    staged = tmp_path / ".model.gguf.llmopt-staging" / "file" / "model.gguf"
    whole = GGUFFile(published.path)
    again = GGUFFile(staged)
    assert again.names == whole.names
    assert all(torch.equal(again.data(name), whole.data(name)) for name in whole.names)


def test_a_run_killed_between_its_two_renames_is_concluded(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch, no_page: None
) -> None:
    from llmopt.checkpoint import placement

    output, recipe = tmp_path / "model.gguf", gguf_recipe(text)

    def die(*_: object) -> None:
        raise _StopError

    with monkeypatch.context() as patched:
        patched.setattr(placement, "_move_file", die)
        with pytest.raises(_StopError):
            quantize(source, recipe, output)
    assert companion_folder(output).is_dir() and not output.exists()
    with pytest.raises(AlreadyConcludedError) as over:
        quantize(source, recipe, output, resume=True)
    assert over.value.exit_code == 0 and GGUFFile(output).names
    assert {p.name for p in tmp_path.iterdir()} == {"model.gguf", "model.gguf.llmopt"}


def test_gptq_solves_experts_by_their_own_statistics_and_stacks_them(
    tmp_path: Path, text: Path, no_page: None
) -> None:
    folder = write_job(tmp_path, "mixtral", sliding_window=None)
    recipe = gguf_recipe(text, "Q4_0", stage={"solver": "gptq"})
    report = quantize(folder, recipe, tmp_path / "model.gguf").report
    experts = [layer for layer in report.layers if "experts" in layer.name]
    assert len({layer.num_tokens for layer in experts}) > 2
    ours = sum(layer.output_error or 0.0 for layer in report.layers)
    plain = sum(layer.plain_output_error or 0.0 for layer in report.layers)
    assert 0 < ours < 0.9 * plain
    assert GGUFFile(tmp_path / "model.gguf").info("blk.0.ffn_up_exps.weight").shape[0] == 4
    starving = gguf_recipe(
        text,
        "Q4_0",
        calibration={
            "source": str(text),
            "num_samples": 6,
            "sequence_length": 64,
            "min_expert_tokens": 10**6,
        },
    )
    with pytest.raises(BadInputError, match="starves"):
        quantize(folder, starving, tmp_path / "other.gguf")


def test_an_importance_matrix_of_ones_own_takes_the_texts_place(
    tmp_path: Path, source: Path, text: Path, no_page: None
) -> None:
    recipe = gguf_recipe(text, "Q4_0")
    left = tmp_path / ".imatrix.gguf.llmopt-imatrix"  # by a run that was killed
    left.mkdir()
    (left / "states").write_bytes(bytes(100))
    found = gather_imatrix(source, tmp_path / "imatrix.gguf", recipe=recipe)
    assert not left.exists()
    assert found.num_entries == 15 and found.num_tokens == 384 and not found.starved
    calibration = {"source": str(text), "imatrix": str(found.path)}
    given = gguf_recipe(text, "Q4_0", calibration=calibration)
    report = quantize(source, given, tmp_path / "model.gguf").report
    assert report.calibration is None and report.gguf is not None
    assert report.gguf.importance == "imatrix.gguf" and report.gguf.num_weighed == 15
    assert report.gguf.imatrix_sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    # Of the first block nothing was quantized before it: both importances are the same.
    gathered = quantize(source, recipe, tmp_path / "gathered.gguf").path
    ours, theirs = GGUFFile(gathered), GGUFFile(tmp_path / "model.gguf")
    name = "blk.0.attn_q.weight"
    # But for the last bit of a sum that was multiplied and divided.
    assert (ours.data(name) != theirs.data(name)).float().mean() < 0.01
    with pytest.raises(BadInputError, match="exists"):
        gather_imatrix(source, found.path, recipe=recipe)


def test_plain_rounding_is_its_own_yardstick(
    tmp_path: Path, source: Path, text: Path, no_page: None
) -> None:
    stage = {"search": "compatible", "importance": False}
    recipe = gguf_recipe(text, "Q4_0", stage=stage, gate={"relative": {}})
    assert recipe.is_plain_rounding and not recipe.calibrates
    result = quantize(source, recipe, tmp_path / "model.gguf")
    relative = {c.name: c for c in result.report.verdict.criteria}["kl_above_baseline"]
    assert result.published and relative.estimate == 0
    weight = open_checkpoint(source).read("model.layers.0.mlp.up_proj.weight")
    plain = quantize_blocks(weight, GGML_TYPES["Q4_0"], search="compatible").dequantize()
    written = GGUFSource(tmp_path / "model.gguf").read("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(plain, written)


def test_a_file_of_another_model_is_not_compared(
    tmp_path: Path, source: Path, text: Path, published: Result
) -> None:
    other = write_job(tmp_path, num_hidden_layers=2)
    with pytest.raises(BadInputError, match="is .* in .*model.gguf, .* in the source"):
        evaluate(published.path, other, recipe=gguf_recipe(text), text=str(text))
    words = json.loads((source / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = (next(w for w, i in vocabulary.items() if i == n) for n in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    (source_copy := tmp_path / "copy").mkdir()
    for file in source.iterdir():
        (source_copy / file.name).write_bytes(file.read_bytes())
    (source_copy / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(BadInputError, match="token 30[01] is"):
        evaluate(published.path, source_copy, recipe=gguf_recipe(text), text=str(text))


@pytest.mark.parametrize("name", GGUF_RECIPES)
def test_each_recipe_of_the_project_does_what_it_says(
    tmp_path: Path, text: Path, name: str, no_page: None
) -> None:
    """The recipe's own stage and consumers, on a little text and one block."""
    folder = write_job(tmp_path, num_hidden_layers=1, **WIDTHS)
    little = small_recipe(text)
    changes = {key: getattr(little, key) for key in ("calibration", "evaluation", "gate")}
    recipe = load_recipe(name).model_copy(update=changes)
    report = quantize(folder, recipe, tmp_path / "model.gguf").report
    assert report.gguf is not None and not report.gguf.fallbacks
    asked = name.removeprefix("gguf-").removesuffix("-fast").upper()
    assert report.gguf.mixture == asked
    base = asked.removesuffix("_M")
    assert base in report.gguf.types
    solvers = {layer.solver for layer in report.layers if layer.block is not None}
    assert solvers == {recipe.quantize.solver}
