"""A staged output: what is being written, its journal and its scratch files, under a lock.

Beside the output lies ``.NAME.llmopt-staging`` with ``artifact/`` (the folder that will be
published, and nothing else), ``scratch/``, ``journal.json`` and ``lock``; of an output that is one
file also ``parts/``, the shards that it is put together from, and ``file/``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

from llmopt.checkpoint.durable import fsync_path, storage_errors
from llmopt.checkpoint.journal import (
    Journal,
    JournalState,
    check_fingerprint,
    count_intact_blocks,
    read_state,
    write_state,
)
from llmopt.checkpoint.placement import FOLDER, Placement, staged_file
from llmopt.errors import AlreadyConcludedError, BadInputError, StorageError

JOURNAL_FILE = "journal.json"
LOCK_FILE = "lock"


class Artifact:
    """An output that is being written; made by ``open_artifact``, ended by ``publish``.

    Attributes:
        output: where it will be visible.
        staging: the working directory beside ``output``.
        placement: what the output is where people see it.
        directory: the folder that will be visible: write configuration and report here.
        shards: where shards are written; of a folder that is ``directory``.
        file: where an output that is one file is put together.
        scratch: for working files; kept over a resume, never published.
        journal: which blocks are done.
    """

    def __init__(
        self, output: Path, staging: Path, journal: Journal, lock: int, placement: Placement
    ) -> None:
        self.output = output
        self.staging = staging
        self.placement = placement
        self.directory = staging / "artifact"
        self.shards = staging / placement.shards
        self.file = staged_file(staging, output)
        self.scratch = staging / "scratch"
        self.journal = journal
        self._lock: int | None = lock

    def close(self) -> None:
        """Releases the lock; what is staged stays for a resume."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        """The artifact itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()


def open_artifact(
    output: Path,
    fingerprint: Mapping[str, str],
    *,
    resume: bool,
    needed_bytes: int,
    placement: Placement = FOLDER,
) -> Artifact:
    """Begins an output, or with ``resume`` continues one that was interrupted, if there is one.

    Args:
        output: a path that is free (``check_output``); it is not touched before ``publish``.
        fingerprint: what must be equal for a resume to give the same bytes.
        resume: continue from the staging directory.
        needed_bytes: disk space of the whole run, scratch files included.
        placement: what the output is.

    Raises:
        BadInputError: an output that is taken; an interrupted run in the way, another run at work
            on it, or one with another fingerprint.
        AlreadyConcludedError: the run to resume needs no resuming.
        StorageError: too small a disk, or one that refuses.
    """
    output = Path(os.path.abspath(output))
    staging = _staging_of(output)
    with storage_errors(f"cannot stage {output}"):
        interrupted = has_interrupted_run(output)
        check_output(output, resume=resume, placement=placement)
        check_space(output, needed_bytes)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            staging.mkdir()
        except FileExistsError:
            interrupted = True
        lock = _lock(staging)
    try:
        if interrupted and not resume:
            raise BadInputError(
                f"{staging} holds an interrupted run for {output}",
                f"continue it with --resume, or remove {staging}",
            )
        journal = _journal(output, staging, fingerprint, placement)
        return Artifact(output, staging, journal, lock, placement)
    except BaseException:
        if not interrupted:
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)
        raise


def _staging_of(output: Path) -> Path:
    output = Path(os.path.abspath(output))
    return output.parent / f".{output.name}.llmopt-staging"


def remove_staging(staging: Path) -> None:
    """Removes a staging directory; the journal goes late, so that a kill leaves it readable."""
    for folder in sorted(path for path in staging.iterdir() if path.is_dir()):
        shutil.rmtree(folder)
    shutil.rmtree(staging)
    fsync_path(staging.parent)


def _journal(
    output: Path, staging: Path, fingerprint: Mapping[str, str], placement: Placement
) -> Journal:
    """The journal to go on with; the staged directories hold what it says and no more."""
    path, directory, shards = staging / JOURNAL_FILE, staging / "artifact", placement.shards
    if not path.exists():  # killed before anything was written, or a new run
        placement.check_free(output)
        with storage_errors(f"cannot stage {output}"):
            for name in (*placement.folders, "scratch"):
                if (staging / name).exists():
                    shutil.rmtree(staging / name)
                (staging / name).mkdir()
            write_state(path, JournalState(fingerprint=dict(fingerprint)))
            fsync_path(staging.parent)
        return Journal(path, read_state(path))
    state = read_state(path)
    if state.conclusion is not None and not directory.exists():
        with storage_errors(f"cannot conclude {staging}"):
            if state.conclusion.destination == output.name:
                _conclude(output, staging, placement)
            fsync_path(output.parent)
            remove_staging(staging)
        raise AlreadyConcludedError(
            state.conclusion.outcome, output.parent / state.conclusion.destination
        )
    placement.check_free(output)
    check_fingerprint(state, fingerprint, staging)
    journal = Journal(path, state)
    if state.conclusion is not None:
        journal.conclude(None)
    with storage_errors(f"cannot read back {staging / shards}"):
        intact = count_intact_blocks(state, staging / shards)
        if intact < len(state.blocks):
            # What the block after the last intact one starts from is gone: scratch files hold
            # the inputs of the block that came next, and no earlier ones.
            journal.keep_blocks(0)
        files = {entry.shard.file for entry in journal.blocks}
        for name in placement.folders:
            _remove_all_but(staging / name, files if name == shards else set())
        _remove_all_but(staging, {JOURNAL_FILE, LOCK_FILE, "scratch", *placement.folders})
    return journal


def _conclude(output: Path, staging: Path, placement: Placement) -> None:
    try:
        placement.conclude(staging, output)
    except FileExistsError as error:
        raise BadInputError(
            f"{output} came into being before the finished run could be shown there",
            "move it away and continue with --resume",
        ) from error


def clear_folder(directory: Path) -> None:
    """Remove everything in a directory."""
    _remove_all_but(directory, set())


def _remove_all_but(directory: Path, kept: set[str]) -> None:
    for path in sorted(directory.iterdir()):
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_output(output: Path, *, resume: bool = False, placement: Placement = FOLDER) -> None:
    """Hold that an output path is free, as its placement has it.

    With ``resume`` and something to resume the path may be taken: by that very run, killed after
    its output was in place. ``open_artifact`` tells.

    Raises:
        BadInputError: a link, a file, or a directory that is not empty.
    """
    interrupted = has_interrupted_run(output)
    if interrupted and resume:
        return
    try:
        placement.check_free(output)
    except BadInputError as error:
        if not interrupted:
            raise
        # It may be half of what that very run has shown: killed between two renames.
        remedy = f"an interrupted run for it lies in {_staging_of(output)}: continue with --resume"
        raise BadInputError(error.what, remedy) from error


def has_interrupted_run(output: Path) -> bool:
    """Whether there is something to resume for ``output``."""
    staging = _staging_of(output)
    return staging.is_dir() and not staging.is_symlink()


def check_space(output: Path, needed_bytes: int) -> None:
    """Hold that the folder of ``output`` can be written to and its disk has room.

    What an interrupted run for it has staged counts as room.

    Raises:
        BadInputError: a file stands in the way.
        StorageError: too small a disk, or one that refuses.
    """
    staging = _staging_of(output)
    ancestor = staging.parent
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise BadInputError(f"{ancestor} is a file", "choose another output directory")
    with storage_errors(f"cannot write in {ancestor}"), TemporaryFile(dir=ancestor):
        pass
    missing_bytes = needed_bytes - (_allocated_bytes(staging) if staging.is_dir() else 0)
    free_bytes = shutil.disk_usage(ancestor).free
    if missing_bytes > free_bytes:
        raise StorageError(
            f"the disk of {output} is too small: {missing_bytes / 1e9:.2f} GB more are needed, "
            f"{free_bytes / 1e9:.2f} GB are free",
            "free space there, or choose an output on another disk",
        )


def _allocated_bytes(directory: Path) -> int:
    # Blocks, not sizes: the scratch files may be sparse, and their holes must still find space.
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:  # another run, whose lock is seen later, is at work
                continue
    return total


def _lock(staging: Path) -> int:
    """A descriptor that holds the staging directory's lock until it is closed."""
    path = staging / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run that held it may have ended, and removed the file, since it was opened.
        if os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(descriptor)
        raise BadInputError(
            f"another run is at work on {staging}", "wait for it, or choose another output"
        ) from error
    return descriptor
