"""One file and the folder of reports beside it: shown in two renames, never by halves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llmopt.checkpoint.artifact import open_artifact
from llmopt.checkpoint.durable import write_bytes
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.placement import SINGLE_FILE, companion_folder
from llmopt.checkpoint.publish import PublishResult, publish
from llmopt.checkpoint.shards import shard_file_name, write_shard
from llmopt.errors import AlreadyConcludedError, BadInputError, Outcome

NUM_PARTS = 2


@dataclass(frozen=True)
class FixedVerdict:
    outcome: Outcome


def road(output: Path, outcome: Outcome) -> PublishResult:
    """Two parts, gathered into one file, with a report beside it."""
    with open_artifact(
        output, {"version": "1"}, resume=True, needed_bytes=0, placement=SINGLE_FILE
    ) as artifact:
        for index in range(len(artifact.journal.blocks), NUM_PARTS):
            path = artifact.shards / shard_file_name(index, NUM_PARTS)
            record = write_shard(path, {f"part.{index}": torch.full((3,), float(index))})
            artifact.journal.append(BlockEntry(index=index, shard=record))
        parts = sorted(artifact.shards.iterdir())
        write_bytes(artifact.file, b"".join(part.read_bytes() for part in parts))
        write_bytes(artifact.directory / "llmopt.json", b'{"verdict": "kept"}')
        return publish(artifact, FixedVerdict(outcome))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def shown(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def test_a_pass_shows_the_file_and_its_folder_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    assert road(output, "pass") == PublishResult(output, True)
    assert set(contents(tmp_path)) == {"model.gguf", "model.gguf.llmopt/llmopt.json"}
    assert output.stat().st_nlink == 1


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_a_quarantine_holds_both_under_a_name_that_nobody_serves(
    outcome: Outcome, tmp_path: Path
) -> None:
    whole = road(tmp_path / "whole.gguf", "pass").path.read_bytes()
    output = tmp_path / "model.gguf"
    for name in ("model.gguf.quarantine", "model.gguf.quarantine-2"):
        result = road(output, outcome)
        assert result == PublishResult(tmp_path / name, False)
        found = contents(result.path)
        assert set(found) == {"llmopt.json", "model.gguf.quarantined"}
        assert found["model.gguf.quarantined"] == whole
    assert not output.exists() and not companion_folder(output).exists()
    assert not any(path.suffix == ".gguf" for path in result.path.iterdir())


@pytest.mark.parametrize("taken", ["model.gguf", "model.gguf.llmopt/old.json"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_way_is_refused_before_work(taken: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    if kind == "file":
        (tmp_path / taken).write_text("mine")
    else:
        (tmp_path / taken).symlink_to("nowhere")
    with pytest.raises(BadInputError, match="exists|not empty"):
        road(tmp_path / "model.gguf", "pass")
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("taken", ["model.gguf", "model.gguf.llmopt/mine"])
def test_what_came_into_being_is_not_written_over(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, path = tmp_path / "model.gguf", tmp_path / taken
    real = SINGLE_FILE.show

    def late(staging: Path, output: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        real(staging, output)

    monkeypatch.setattr(SINGLE_FILE, "show", late)
    with pytest.raises(BadInputError, match="came into being"):
        road(output, "pass")
    assert contents(tmp_path)[taken] == b"mine"
    # Neither half is visible, and all is staged as before.
    assert output.exists() == (taken == "model.gguf")
    assert {"mine"} >= {p.name for p in companion_folder(output).glob("*")}
    monkeypatch.setattr(SINGLE_FILE, "show", real)
    path.unlink()
    assert road(output, "pass").published


def killed_between_the_renames(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is shown, the file is still staged, and the journal says that the run is over."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmopt.checkpoint.placement._move_file", killed)
        with pytest.raises(KeyboardInterrupt):
            road(output, "pass")
    assert companion_folder(output).is_dir() and not output.exists()


def test_a_finished_run_that_was_killed_before_its_file_is_shown_is_to_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model.gguf"
    killed_between_the_renames(output, monkeypatch)
    with pytest.raises(BadInputError) as caught:
        open_artifact(output, {"version": "1"}, resume=False, needed_bytes=0, placement=SINGLE_FILE)
    assert "continue with --resume" in caught.value.remedy
    output.write_text("mine")
    with pytest.raises(BadInputError, match="came into being before") as caught:
        road(output, "pass")
    assert "move it away" in caught.value.remedy and output.read_text() == "mine"
    output.unlink()
    with pytest.raises(AlreadyConcludedError):
        road(output, "pass")
    assert output.stat().st_size > 0


def test_where_links_are_unknown_the_file_is_renamed_and_still_not_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert road(tmp_path / "model.gguf", "pass").published
    with pytest.raises(BadInputError):
        road(tmp_path / "model.gguf", "pass")


@pytest.mark.parametrize(("outcome", "power_cut"), [("pass", True), ("fail", False)])
def test_kill_at_every_step_then_resume_gives_the_same_bytes(
    outcome: Outcome, power_cut: bool, tmp_path: Path, run_and_kill: Callable[..., bool]
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    road(whole / "model.gguf", outcome)
    expected, between = contents(whole), 0
    for step in range(1, 1000):
        folder = tmp_path / str(step)
        folder.mkdir()
        output = folder / "model.gguf"
        killed = run_and_kill(
            step, folder, lambda at=output: road(at, outcome), power_cut=power_cut
        )
        visible = shown(folder)
        # Whatever is visible is whole, and a file is never there without its report.
        assert visible.items() <= expected.items()
        assert "model.gguf" not in visible or visible == expected
        between += "model.gguf.llmopt/llmopt.json" in visible and "model.gguf" not in visible
        try:
            road(output, outcome)
        except AlreadyConcludedError as error:
            assert visible and error.outcome == outcome
        except BadInputError:  # published, and the journal was gone already
            assert visible == expected and outcome == "pass"
        # Killed when nothing but the lock was left, a failing run is run, and shelved, again.
        assert expected.items() <= shown(folder).items()
        if not killed:
            assert step > 40 and (between > 0 or outcome == "fail")
            return
    raise AssertionError("the road did not come to its end")
