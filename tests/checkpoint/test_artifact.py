from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmopt.checkpoint.artifact import Artifact, open_artifact
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.shards import write_shard
from llmopt.errors import BadInputError, StorageError

FINGERPRINT = {"torch": "2.13", "threads": "2"}


def begin(output: Path, *, resume: bool = False, needed_bytes: int = 0) -> Artifact:
    return open_artifact(output, FINGERPRINT, resume=resume, needed_bytes=needed_bytes)


def add_block(artifact: Artifact, name: str) -> None:
    record = write_shard(artifact.directory / name, {name: torch.ones(5)})
    artifact.journal.append(BlockEntry(index=len(artifact.journal.blocks), shard=record))


def interrupted(output: Path, *names: str) -> Path:
    with begin(output) as artifact:
        for name in names:
            add_block(artifact, name)
        return artifact.staging


def refusal(output: Path, *, resume: bool = False) -> str:
    with pytest.raises(BadInputError) as caught:
        begin(output, resume=resume)
    assert caught.value.remedy
    return caught.value.what


@pytest.mark.parametrize("exists", [False, True])
def test_staging_lies_beside_an_output_that_is_not_touched(exists: bool, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    if exists:
        output.mkdir(parents=True)
    with begin(output) as artifact:
        assert artifact.staging == tmp_path / "new" / ".out.llmopt-staging"
        assert artifact.output == output and artifact.directory.is_dir()
        assert list(artifact.directory.iterdir()) == [] == list(artifact.scratch.iterdir())
        assert artifact.journal.state.fingerprint == FINGERPRINT
        assert output.exists() == exists


def test_an_output_that_is_something_already(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "x").write_text("")
    for resume in (False, True):
        assert "not empty" in refusal(output, resume=resume)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    assert "is a file" in refusal(tmp_path / "file" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in refusal(tmp_path / "link")
    (tmp_path / "elsewhere").mkdir()
    assert "symbolic link" in refusal(tmp_path / "link")
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_run_is_in_the_way_until_resumed(tmp_path: Path) -> None:
    staging = interrupted(tmp_path / "out", "a")
    assert f"{staging} holds an interrupted run" in refusal(tmp_path / "out")
    with begin(tmp_path / "out", resume=True) as artifact:
        assert [block.shard.file for block in artifact.journal.blocks] == ["a"]


def test_resume_of_nothing_begins(tmp_path: Path) -> None:
    with begin(tmp_path / "out", resume=True) as artifact:
        assert artifact.journal.blocks == ()


def test_resume_keeps_blocks_and_scratch_and_removes_the_rest(tmp_path: Path) -> None:
    staging = interrupted(tmp_path / "out", "a", "b")
    (staging / "scratch" / "hidden").write_text("states")
    (staging / "artifact" / ".c.llmopt-tmp").write_text("half a shard")
    (staging / "artifact" / "c").write_text("a shard that no journal knows")
    (staging / "artifact" / "config.json").write_text("{}")
    (staging / "artifact" / "folder").mkdir()
    (staging / "artifact" / "folder" / "file").write_text("")
    (staging / ".journal.json.llmopt-tmp").write_text("{")
    with begin(tmp_path / "out", resume=True) as artifact:
        assert sorted(path.name for path in artifact.directory.iterdir()) == ["a", "b"]
        assert (artifact.scratch / "hidden").read_text() == "states"
        assert {path.name for path in staging.iterdir()} == {
            "artifact", "scratch", "journal.json", "lock",
        }  # fmt: skip


@pytest.mark.parametrize("harm", ["missing", "short", "flipped", "directory"])
def test_one_bad_shard_and_all_blocks_are_done_again(harm: str, tmp_path: Path) -> None:
    staging = interrupted(tmp_path / "out", "a", "b", "c")
    shard = staging / "artifact" / "b"
    content = bytearray(shard.read_bytes())
    shard.unlink()
    if harm == "short":
        shard.write_bytes(content[:-1])
    elif harm == "flipped":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif harm == "directory":
        shard.mkdir()
    for _ in range(2):  # what was dropped stays dropped
        with begin(tmp_path / "out", resume=True) as artifact:
            assert artifact.journal.blocks == () and not list(artifact.directory.iterdir())


def test_another_fingerprint_refuses_lists_and_harms_nothing(tmp_path: Path) -> None:
    staging = interrupted(tmp_path / "out", "a")
    with pytest.raises(BadInputError, match="threads: then 2, now 4") as caught:
        open_artifact(
            tmp_path / "out", {**FINGERPRINT, "threads": "4"}, resume=True, needed_bytes=0
        )
    assert "torch" not in caught.value.what and str(staging) in caught.value.what
    with begin(tmp_path / "out", resume=True) as artifact:
        assert len(artifact.journal.blocks) == 1


def test_two_runs_do_not_share_a_staging_directory(tmp_path: Path) -> None:
    with begin(tmp_path / "out") as artifact:
        add_block(artifact, "a")
        for resume in (False, True):
            assert "another run is at work" in refusal(tmp_path / "out", resume=resume)
        assert artifact.directory.joinpath("a").exists()
    begin(tmp_path / "out", resume=True).close()


def test_a_killed_run_leaves_no_lock(tmp_path: Path, run_and_kill: Callable[..., bool]) -> None:
    def work() -> None:
        artifact = begin(tmp_path / "out")
        while True:
            add_block(artifact, f"block-{len(artifact.journal.blocks)}")

    assert run_and_kill(60, tmp_path, work)
    with begin(tmp_path / "out", resume=True) as artifact:
        assert len(artifact.journal.blocks) > 2


def test_a_disk_that_is_too_small_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too small: 1000000000.00 GB more"):
        begin(tmp_path / "new" / "out", needed_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_what_is_staged_already_counts_as_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = interrupted(tmp_path / "out")
    (staging / "scratch" / "hidden").write_bytes(b"x" * 100_000)
    with (staging / "scratch" / "holes").open("wb") as file:
        file.truncate(1 << 30)  # sparse: its bytes are still to be found

    monkeypatch.setattr(
        "llmopt.checkpoint.artifact.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": 1_000_000}),
    )
    begin(tmp_path / "out", resume=True, needed_bytes=1_090_000).close()
    with pytest.raises(StorageError, match="too small"):
        begin(tmp_path / "out", resume=True, needed_bytes=1_300_000)


def test_a_damaged_journal_is_refused_and_kept(tmp_path: Path) -> None:
    staging = interrupted(tmp_path / "out", "a")
    (staging / "journal.json").write_text("{")
    assert "not a journal" in refusal(tmp_path / "out", resume=True)
    assert (staging / "artifact" / "a").exists()


def test_a_full_disk_at_the_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmopt.checkpoint.durable.os.write", full)
    with pytest.raises(StorageError, match="No space left"):
        begin(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_and_a_resume(small_disk: Path) -> None:
    with begin(small_disk / "out") as artifact:
        add_block(artifact, "a")
        with pytest.raises(StorageError):
            write_shard(artifact.directory / "b", {"b": torch.ones(1 << 19)})
        assert [path.name for path in artifact.directory.iterdir()] == ["a"]
    with begin(small_disk / "out", resume=True) as artifact:
        add_block(artifact, "b")
        assert [block.shard.file for block in artifact.journal.blocks] == ["a", "b"]
