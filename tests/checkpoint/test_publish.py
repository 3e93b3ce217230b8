from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llmopt.checkpoint.artifact import Artifact, open_artifact
from llmopt.checkpoint.durable import write_bytes
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.publish import PublishResult, publish
from llmopt.checkpoint.shards import shard_file_name, write_index, write_shard
from llmopt.errors import AlreadyConcludedError, BadInputError, ExitCode, Outcome

NUM_BLOCKS = 2


@dataclass(frozen=True)
class FixedVerdict:
    outcome: Outcome


def road(output: Path, outcome: Outcome) -> PublishResult:
    """A small pipeline: blocks that build on each other's scratch file, index, report, publish."""
    with open_artifact(output, {"version": "1"}, resume=True, needed_bytes=0) as artifact:
        for index in range(len(artifact.journal.blocks), NUM_BLOCKS):
            hidden = artifact.scratch / f"hidden-{index}"
            state = float(hidden.read_text()) if index else 1.0
            write_bytes(artifact.scratch / f"hidden-{index + 1}", str(state * 2 + 1).encode())
            path = artifact.directory / shard_file_name(index, NUM_BLOCKS)
            record = write_shard(path, {f"block.{index}": torch.full((3, index + 1), state)})
            artifact.journal.append(BlockEntry(index=index, shard=record))
        return finish(artifact, outcome)


def finish(artifact: Artifact, outcome: Outcome) -> PublishResult:
    write_index(artifact.directory, [block.shard for block in artifact.journal.blocks])
    (artifact.directory / "nested").mkdir()
    # Plainly written: that it is on disk before it is visible is publish's work.
    report = os.open(artifact.directory / "nested" / "llmopt.json", os.O_WRONLY | os.O_CREAT)
    os.write(report, b'{"verdict": "kept"}')
    os.close(report)
    return publish(artifact, FixedVerdict(outcome))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("empty_output", [False, True])
def test_a_pass_is_published_and_nothing_else_remains(empty_output: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if empty_output:
        output.mkdir()
    assert road(output, "pass") == PublishResult(output, True)
    assert names(tmp_path) == ["out"]
    shards = [shard_file_name(i, NUM_BLOCKS) for i in range(NUM_BLOCKS)]
    assert names(output) == sorted([*shards, "model.safetensors.index.json", "nested"])


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_anything_but_a_pass_goes_to_quarantine_whole(outcome: Outcome, tmp_path: Path) -> None:
    road(tmp_path / "good", "pass")
    for name in ("out.quarantine", "out.quarantine-2"):
        assert road(tmp_path / "out", outcome) == PublishResult(tmp_path / name, False)
        assert contents(tmp_path / name) == contents(tmp_path / "good")
        assert not (tmp_path / "out").exists()
    # A quarantine does not stand in the way of a later pass.
    road(tmp_path / "out", "pass")
    assert names(tmp_path) == ["good", "out", "out.quarantine", "out.quarantine-2"]


@pytest.mark.parametrize("outcome", ["PASS", "", None])
def test_no_other_word_publishes(outcome: Outcome, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        road(tmp_path / "out", outcome)
    assert not (tmp_path / "out").exists()


def test_temporary_files_are_not_published(tmp_path: Path) -> None:
    with open_artifact(tmp_path / "out", {}, resume=False, needed_bytes=0) as artifact:
        (artifact.directory / "sub").mkdir()
        (artifact.directory / "sub" / ".x.llmopt-tmp").write_text("half")
        (artifact.directory / "config.json").write_text("{}")
        publish(artifact, FixedVerdict("pass"))
    assert contents(tmp_path / "out") == {"config.json": b"{}"}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_an_output_that_came_into_being_is_not_written_over(kind: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with open_artifact(output, {"version": "1"}, resume=False, needed_bytes=0) as artifact:
        if kind == "directory":
            output.mkdir()
            (output / "mine").write_text("mine")
        else:
            output.write_text("mine")
        with pytest.raises(BadInputError, match="came into being"):
            finish(artifact, "pass")
    found = output / "mine" if kind == "directory" else output
    assert found.read_text() == "mine"
    found.unlink()
    assert road(output, "pass").published


def test_the_rename_is_on_disk_before_the_journal_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename changes two directories; both are synced before working files are removed."""
    steps: list[str] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def traced_fsync(descriptor: int) -> None:
        steps.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def traced_rename(old: Path, new: Path) -> None:
        steps.append(f"rename to {new.name}")
        rename(old, new)

    def traced_unlink(path: str | Path, *, dir_fd: int | None = None) -> None:
        steps.append(f"unlink {Path(path).name}")
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    monkeypatch.setattr(os, "unlink", traced_unlink)
    road(tmp_path / "out", "pass")
    begin = steps.index("rename to out")
    assert steps[begin + 1 : begin + 3] == [
        "fsync .out.llmopt-staging",
        f"fsync {tmp_path.name}",
    ]
    assert "unlink journal.json" in steps[begin + 3 :]
    assert "unlink journal.json" not in steps[:begin]


@pytest.mark.parametrize("outcome", ["pass", "fail"])
@pytest.mark.parametrize("power_cut", [False, True])
def test_kill_at_every_step_then_resume_gives_the_same_bytes(
    outcome: Outcome, power_cut: bool, tmp_path: Path, run_and_kill: Callable[..., bool]
) -> None:
    expected = contents(road(tmp_path / "whole" / "out", outcome).path)
    concluded = 0
    for step in range(1, 1000):
        folder = tmp_path / str(step)
        folder.mkdir()
        output, quarantine = folder / "out", folder / "out.quarantine"
        killed = run_and_kill(
            step, folder, lambda at=output: road(at, outcome), power_cut=power_cut
        )
        complete = output if outcome == "pass" else quarantine
        was_visible = complete.exists()
        if was_visible:  # whole from the first moment on
            assert contents(complete) == expected
        try:
            road(output, outcome)
        except AlreadyConcludedError as error:
            concluded += 1
            assert was_visible and error.destination == complete and error.outcome == outcome
            assert error.exit_code is (ExitCode.PASS if outcome == "pass" else ExitCode.FAIL)
        except BadInputError as error:  # published, and the journal was gone already
            assert was_visible and outcome == "pass" and "not empty" in error.what
        assert contents(complete) == expected
        assert output.exists() == (outcome == "pass")
        if not killed:
            assert step > 50 and concluded > 3
            return
    raise AssertionError("the road did not come to its end")
