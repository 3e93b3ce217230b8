from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from support.small_jobs import small_recipe, write_job, write_text
from support.tiny_models import CONFIGS, rewrite_tensors

import llmopt
from llmopt import pipeline, reporting
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.errors import BrokenArtifactError, ExitCode, LlmoptError, RoundTripError
from llmopt.formats.dequantized import DequantizedSource
from llmopt.pipeline import quantize
from llmopt.recipe import load_recipe, recipe_files
from llmopt.report.failure import Failure
from llmopt.report.json_file import read_json
from llmopt.report.schema import Report
from llmopt.targets.checkpoint import CheckpointTarget

# Those of GGUF types have a test of their own beside that target.
INTEGER_RECIPES = [name for name in sorted(recipe_files()) if not name.startswith("gguf-")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path
) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("published") / "int4"
    result = quantize(source, small_recipe(text), output)
    assert result.published and result.path == output and result.exit_code is ExitCode.PASS
    return output, result.report


def test_every_source_tensor_has_a_fate_and_the_report_on_disk_says_so(
    published: tuple[Path, Report], source: Path
) -> None:
    output, report = published
    assert read_json(output / "llmopt.json") == report
    assert {entry.name for entry in report.ledger.entries} == set(open_checkpoint(source).names)
    fates = {entry.name: str(entry.fate) for entry in report.ledger.entries}
    assert fates["model.layers.0.mlp.up_proj.weight"] == "quantized"
    assert fates["model.layers.0.input_layernorm.weight"] == "copied"
    assert report.round_trip.num_tensors == len(report.ledger.entries)
    assert len(report.layers) == 21 and all(layer.num_tokens == 384 for layer in report.layers)
    assert not list(output.parent.glob(".*staging*"))


def test_the_solver_beats_plain_rounding_on_what_it_was_given(
    published: tuple[Path, Report],
) -> None:
    ours = sum(layer.output_error or 0.0 for layer in published[1].layers)
    plain = sum(layer.plain_output_error or 0.0 for layer in published[1].layers)
    assert 0 < ours < 0.8 * plain


def test_copied_tensors_are_the_sources_bytes_and_quantized_ones_are_near(
    published: tuple[Path, Report], source: Path
) -> None:
    before, after = open_checkpoint(source), DequantizedSource(open_checkpoint(published[0]))
    for name in before.names:
        old, new = before.read(name), after.read(name)
        if "_proj" in name:
            assert 0 < (old.float() - new).norm() < 0.2 * old.float().norm()
        else:
            assert torch.equal(old, new) and old.dtype == new.dtype


def test_transformers_and_llmopt_load_open_what_was_published(
    published: tuple[Path, Report], source: Path
) -> None:
    from transformers import AutoModelForCausalLM

    token_ids = torch.randint(0, 512, (2, 19), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = DequantizedSource(open_checkpoint(published[0]))
    dense.load_state_dict({name: weights.read(name).float() for name in weights.names})
    theirs = AutoModelForCausalLM.from_pretrained(published[0], dtype=torch.float32).eval()
    ours = llmopt.load(published[0], dtype=torch.float32)
    with torch.no_grad():
        wanted = dense(token_ids).logits
        torch.testing.assert_close(theirs(token_ids).logits, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(token_ids).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", sorted(set(CONFIGS) - {"llama"}))
def test_every_architecture_goes_down_the_road(
    tmp_path: Path, text: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "write_html", lambda *_: None)  # half of the time, and no matter
    source = write_job(tmp_path, architecture)
    result = quantize(source, small_recipe(text), tmp_path / "out")
    assert result.published, result.report.verdict.criteria
    before, after = open_checkpoint(source), DequantizedSource(open_checkpoint(result.path))
    changed = {
        n for n in before.names if not torch.equal(before.read(n).float(), after.read(n).float())
    }
    blocks = [n for n in before.names if re.match(r"(language_model\.)?model\.layers\.\d", n)]
    routers = {n for n in blocks if n.endswith(".gate.weight")}
    matrices = {n for n in blocks if len(before.info(n).shape) == 2}
    assert changed == matrices - routers
    assert "auto_map" not in json.loads((result.path / "config.json").read_text())
    experts = result.report.coverage.expert_tokens
    assert (experts is None) == (not routers) == (architecture not in ("mixtral", "qwen3_moe"))
    if experts is not None:
        assert experts.num_experts == {"mixtral": 3 * 4, "qwen3_moe": 2 * 5}[architecture]
        assert 32 <= experts.fewest <= experts.median <= experts.most <= 6 * 64


def test_plain_rounding_needs_no_text_and_is_its_own_baseline(
    tmp_path: Path, source: Path, text: Path
) -> None:
    recipe = small_recipe(text, stage={"solver": "rtn"}, gate={"relative": {"allowed_ratio": 1.0}})
    result = quantize(source, recipe, tmp_path / "out")
    assert result.published and result.report.calibration is None
    relative = [c for c in result.report.verdict.criteria if c.name == "kl_above_baseline"]
    assert relative[0].estimate == 0.0


def test_a_refused_artifact_is_not_at_the_output_path(
    tmp_path: Path, source: Path, text: Path
) -> None:
    recipe = small_recipe(
        text,
        stage={"solver": "rtn", "scheme": {"bits": 2, "group_size": 32}},
        gate={"margins": {"mean_kl": 1e-6}},
    )
    result = quantize(source, recipe, tmp_path / "out")
    assert result.exit_code is ExitCode.FAIL and not result.published
    assert not (tmp_path / "out").exists()
    assert result.path == tmp_path / "out.quarantine"
    assert read_json(result.path / "llmopt.json").verdict.outcome == "fail"


@pytest.mark.parametrize(
    ("stage", "error"), [("round trip", RoundTripError), ("gate", BrokenArtifactError)]
)
def test_an_artifact_that_breaks_before_its_verdict_is_quarantined_with_a_report(
    tmp_path: Path,
    source: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: type[LlmoptError],
) -> None:
    def broken(*_: object) -> None:
        raise error("tensor x differs", "look at it")

    if stage == "round trip":
        monkeypatch.setattr(CheckpointTarget, "read_back", broken)
    else:
        monkeypatch.setattr(pipeline, "_judge", broken)
    recipe = small_recipe(text, stage={"solver": "rtn"})
    with pytest.raises(error, match=r"tensor x differs; it is in .*out\.quarantine") as caught:
        quantize(source, recipe, tmp_path / "out")
    assert caught.value.exit_code == ExitCode.FAIL
    assert [path.name for path in tmp_path.iterdir()] == ["out.quarantine"]
    found = Failure.model_validate_json((tmp_path / "out.quarantine/failure.json").read_text())
    assert (found.stage, found.what) == (stage, "tensor x differs") and len(found.layers) == 21
    assert "must not be used" in (tmp_path / "out.quarantine/README.md").read_text()


def test_bytes_that_change_on_the_disk_are_refused_by_the_round_trip(
    tmp_path: Path, source: Path, text: Path
) -> None:
    def damage(task: str, completed: int, _: int) -> None:
        if task == "read back" and completed == 0:
            shard = sorted((tmp_path / ".out.llmopt-staging/artifact").glob("*.safetensors"))[0]
            shard.write_bytes(shard.read_bytes()[:-1] + b"x")

    with pytest.raises(RoundTripError, match="1 tensors on disk are not what was calibrated"):
        quantize(
            source, small_recipe(text, stage={"solver": "rtn"}), tmp_path / "out", progress=damage
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.quarantine"]


def test_an_undecided_gate_publishes_nothing_and_has_its_own_exit_code(
    tmp_path: Path, source: Path, text: Path, published: tuple[Path, Report]
) -> None:
    kl = next(c for c in published[1].verdict.criteria if c.name == "mean_kl").estimate
    result = quantize(
        source, small_recipe(text, gate={"margins": {"mean_kl": kl}}), tmp_path / "out"
    )
    assert result.exit_code is ExitCode.INCONCLUSIVE and not (tmp_path / "out").exists()


def test_eval_repeats_the_gate_and_notices_what_changed_since(
    tmp_path: Path, source: Path, text: Path, published: tuple[Path, Report]
) -> None:
    import shutil

    recipe = small_recipe(text, evaluation={"sources": [str(text)]})
    clean = llmopt.evaluate(published[0], source, recipe=recipe)
    assert clean.exit_code is ExitCode.PASS
    assert not [note for note in clean.notes if "changed since" in note]

    copy = tmp_path / "copy"
    shutil.copytree(published[0], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    notes = llmopt.evaluate(copy, source, recipe=recipe).notes
    assert any("changed since" in note and "config.json" in note for note in notes)


def test_a_scheme_for_single_layers_reaches_the_file_and_its_consumers(
    tmp_path: Path, source: Path, text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    stage = {
        "ignore": ["*.layers.1.*"],
        "overrides": [{"match": "*.down_proj", "scheme": {"bits": 8, "group_size": None}}],
    }
    result = quantize(source, small_recipe(text, stage=stage), tmp_path / "out")
    bits = {layer.name: layer.scheme.bits for layer in result.report.layers}
    assert bits["model.layers.0.mlp.down_proj"] == 8 and bits["model.layers.0.mlp.up_proj"] == 4
    assert not any(".layers.1." in name for name in bits)
    token_ids = torch.arange(40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32).eval()
    ours = llmopt.load(result.path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(token_ids).logits, ours(token_ids).logits, atol=1e-4, rtol=1e-4
        )


def test_what_must_work_an_input_column_that_is_always_zero(tmp_path: Path, text: Path) -> None:
    source = write_job(tmp_path)

    def kill_column(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][5] = 0.0

    rewrite_tensors(source, kill_column)
    result = quantize(source, small_recipe(text), tmp_path / "out")
    assert result.published and result.report.coverage.num_dead_columns == 3  # q, k and v
    assert result.report.calibration is not None
    assert any("no pad token" in note for note in result.report.calibration.notes)


def test_what_must_work_a_singular_hessian(tmp_path: Path, text: Path) -> None:
    source = write_job(tmp_path)

    def copy_columns(tensors: dict[str, torch.Tensor]) -> None:
        # Rank one: every token and every norm gives the same direction.
        tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][:1]

    rewrite_tensors(source, copy_columns)
    recipe = small_recipe(text, stage={"damping": 1e-12})
    result = quantize(source, recipe, tmp_path / "out")
    assert result.published and result.report.coverage.num_singular_hessians > 0
    assert any(layer.num_damping_escalations for layer in result.report.layers)


def test_a_named_task_joins_the_criteria(tmp_path: Path, source: Path, text: Path) -> None:
    recipe = small_recipe(text, stage={"solver": "rtn"}, gate={"tasks": {"key_value_recall": 0.9}})
    verdict = quantize(source, recipe, tmp_path / "out").report.verdict
    (task,) = [c for c in verdict.criteria if c.name == "task_accuracy_drop:key_value_recall"]
    assert task.outcome == "pass" and task.low < task.high <= 0.9


@pytest.mark.parametrize("name", INTEGER_RECIPES)
def test_each_recipe_of_the_project_does_what_it_says(
    tmp_path: Path, text: Path, name: str
) -> None:
    """The recipe's own stage and consumers, on a little text."""
    widths = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    source = write_job(tmp_path, num_key_value_heads=2, head_dim=32, num_hidden_layers=1, **widths)
    little = small_recipe(text)
    changes = {key: getattr(little, key) for key in ("calibration", "evaluation", "gate")}
    recipe = load_recipe(name).model_copy(update=changes)
    result = quantize(source, recipe, tmp_path / "out")
    assert result.published and len(result.report.layers) == 7
    for layer in result.report.layers:
        assert layer.solver == recipe.quantize.solver
        assert (
            layer.scheme.model_dump(exclude={"name", "is_ggml"})
            == recipe.quantize.scheme.model_dump()
        )
    opened = DequantizedSource(open_checkpoint(result.path))
    wanted = recipe.quantize.scheme.scheme()
    if recipe.output.format != "compressed-tensors" and wanted.activation_order == "weight":
        # It leaves the groups where they lie, and these files have no word for it.
        wanted = dataclasses.replace(wanted, activation_order="none")
    assert {opened.scheme_of(module) for module in opened.quantized_modules} == {wanted}
