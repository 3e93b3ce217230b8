from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_jobs import small_recipe, write_job, write_text
from support.tiny_models import rewrite_config

from llmopt import reporting
from llmopt.errors import AlreadyConcludedError, BadInputError
from llmopt.pipeline import Result, quantize

KILLS = 20
ROOT = Path(__file__).parent.parent


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source, text = write_job(tmp_path), write_text(tmp_path)
    paths = [ROOT, ROOT / "evals", ROOT / "kernels", ROOT / "tests"]
    finished = subprocess.run(
        [sys.executable, "-m", "support.killed_runs", source, text, tmp_path, str(KILLS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    runs = json.loads(finished.stdout.splitlines()[-1])
    assert len(runs["resumed"]) == KILLS and len(runs["whole"]) >= 4
    for run in runs["resumed"]:
        assert run["visible"] in ("nothing", "whole")
        assert run["shards"] == runs["whole"]


class _StopError(Exception):
    pass


def stop_at_block(number: int):  # type: ignore[no-untyped-def]
    def progress(task: str, completed: int, _: int) -> None:
        if task == "quantize" and completed == number:
            raise _StopError

    return progress


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is no part of what resumes, and takes as long as the rest."""
    monkeypatch.setattr(reporting, "write_html", lambda *_: None)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """A mixture whose experts lie in several shards, a text, and what a whole run makes of them."""
    folder = tmp_path_factory.mktemp("mixture")
    source, text = write_job(folder, "mixtral", max_shard_size="20KB"), write_text(folder)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({f for name, f in index.items() if "layers.0.block_sparse_moe" in name}) > 2
    return source, text, shards(quantize(source, small_recipe(text), folder / "whole"))


def shards(result: Result) -> dict[str, bytes]:
    files = sorted(result.path.glob("*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


def test_a_resume_under_other_conditions_is_refused_and_says_which(
    tmp_path: Path, mixture: tuple[Path, Path, dict[str, bytes]]
) -> None:
    source, text, whole = mixture
    output = tmp_path / "out"
    with pytest.raises(_StopError):
        quantize(source, small_recipe(text), output, progress=stop_at_block(2))
    with pytest.raises(BadInputError, match="--resume"):
        quantize(source, small_recipe(text), output)
    other = small_recipe(text, stage={"damping": 0.02})
    with pytest.raises(BadInputError, match="differs from this one in recipe"):
        quantize(source, other, output, resume=True)
    rewrite_config(source, rms_norm_eps=0.5)
    with pytest.raises(BadInputError, match="differs from this one in source"):
        quantize(source, small_recipe(text), output, resume=True)
    rewrite_config(source, rms_norm_eps=1e-5)
    assert shards(quantize(source, small_recipe(text), output, resume=True)) == whole


def test_a_shard_damaged_meanwhile_starts_the_walk_again(
    tmp_path: Path, mixture: tuple[Path, Path, dict[str, bytes]]
) -> None:
    source, text, whole = mixture
    output = tmp_path / "out"
    with pytest.raises(_StopError):
        quantize(source, small_recipe(text), output, progress=stop_at_block(3))
    shard = sorted((tmp_path / ".out.llmopt-staging" / "artifact").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert shards(quantize(source, small_recipe(text), output, resume=True)) == whole


def test_a_run_killed_right_after_its_output_appeared_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.checkpoint import publish

    source, text, output = write_job(tmp_path), write_text(tmp_path), tmp_path / "out"
    recipe = small_recipe(text, stage={"solver": "rtn"})

    def killed(_: Path) -> None:
        raise _StopError

    monkeypatch.setattr(publish, "remove_staging", killed)
    with pytest.raises(_StopError):
        quantize(source, recipe, output)
    with pytest.raises(AlreadyConcludedError) as over:
        quantize(source, recipe, output, resume=True)
    assert over.value.exit_code == 0 and (output / "llmopt.json").is_file()
    assert not list(tmp_path.glob(".out*"))


def test_scales_that_were_folded_are_the_same_after_a_resume(tmp_path: Path) -> None:
    source, text = write_job(tmp_path), write_text(tmp_path)
    stages = [{"kind": "awq", "num_scales": 4}, {"scheme": {"bits": 3, "group_size": 32}}]
    recipe = small_recipe(text, stages=stages)

    def stop_at_reading_back(task: str, _: int, __: int) -> None:
        if task == "read back":
            raise _StopError

    found = []
    for name, stops in (("whole", [None]), ("resumed", [1, 2, None])):
        for number, stop in enumerate(stops):
            progress = stop_at_reading_back if stop is None else stop_at_block(stop)
            with pytest.raises(_StopError):
                output = tmp_path / name
                quantize(source, recipe, output, resume=number > 0, progress=progress)
        artifact = tmp_path / f".{name}.llmopt-staging/artifact"
        files = {path.name: path.read_bytes() for path in artifact.glob("*.safetensors")}
        journal = json.loads((artifact.parent / "journal.json").read_text())
        found.append((files, [entry["payload"] for entry in journal["blocks"]]))
    assert found[0] == found[1] and len(found[0][0]) == 4
    scaled = [payload["written"] for payload in found[0][1]]
    assert all("layernorm" in name for part in scaled for name in part) and any(scaled)
