"""What an output is where people see it, a folder or a file, and how it gets there at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

from llmopt.checkpoint.durable import fsync_path
from llmopt.errors import BadInputError

COMPANION_SUFFIX = ".llmopt"
QUARANTINED_SUFFIX = ".quarantined"
"""Of a file inside a quarantine: nothing that looks for models by their suffix finds it."""


class Placement(Protocol):
    """How the staged parts of an output lie, and how they become visible."""

    @property
    def shards(self) -> str:
        """The folder in the staging directory that journalled shards go to."""
        ...

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders of the staging directory but scratch."""
        ...

    def check_free(self, output: Path) -> None:
        """Hold that nothing is in the way; raises BadInputError."""
        ...

    def show(self, staging: Path, output: Path) -> None:
        """Make what is staged visible at ``output``.

        Raises:
            FileExistsError: something came to lie there; all is staged as before then.
            OSError: the disk refuses.
        """
        ...

    def shelve(self, staging: Path, quarantine: Path) -> None:
        """Move what is staged to ``quarantine`` in one rename, so that nobody takes it for sound.

        Raises:
            FileExistsError: something came to lie there.
            OSError: the disk refuses.
        """
        ...

    def conclude(self, staging: Path, output: Path) -> None:
        """Go on where :meth:`show` was killed after its first rename."""
        ...


class Folder:
    """A directory; one rename shows it."""

    shards = "artifact"
    folders = ("artifact",)

    def check_free(self, output: Path) -> None:
        """Absent, or an empty directory."""
        _check_folder(output, "choose another output directory; llmopt never writes over one")

    def show(self, staging: Path, output: Path) -> None:
        """The rename."""
        _rename_folder(staging / "artifact", output)

    def shelve(self, staging: Path, quarantine: Path) -> None:
        """The rename."""
        _rename_folder(staging / "artifact", quarantine)

    def conclude(self, staging: Path, output: Path) -> None:
        """Nothing: there is no second rename."""


class SingleFile:
    """One file, and beside it a folder ``NAME.llmopt`` with what there is to say of it.

    The folder is renamed into place first and the file last, so that a file that is visible has
    its report. Shards are gathered into the file and are not shown themselves.
    """

    shards = "parts"
    folders = ("artifact", "parts", "file")

    def check_free(self, output: Path) -> None:
        """Nothing at the path, and no folder of reports in the way."""
        remedy = "choose another output file; llmopt never writes over one"
        if os.path.lexists(output):
            raise BadInputError(f"output {output} exists", remedy)
        _check_folder(companion_folder(output), remedy)

    def show(self, staging: Path, output: Path) -> None:
        """The folder, then the file; the folder is taken back where the file finds no room."""
        folder, artifact = companion_folder(output), staging / "artifact"
        _rename_folder(artifact, folder)
        fsync_path(output.parent)
        try:
            _move_file(staged_file(staging, output), output)
        except OSError:
            os.rename(folder, artifact)
            raise

    def shelve(self, staging: Path, quarantine: Path) -> None:
        """The file goes into the folder, under a name that no engine looks for."""
        for file in sorted((staging / "file").iterdir()):
            os.rename(file, staging / "artifact" / f"{file.name}{QUARANTINED_SUFFIX}")
        fsync_path(staging / "artifact")
        _rename_folder(staging / "artifact", quarantine)

    def conclude(self, staging: Path, output: Path) -> None:
        """The file's move, if it is still to be done."""
        file = staged_file(staging, output)
        if file.exists() and not (output.exists() and file.samefile(output)):
            _move_file(file, output)


def companion_folder(file: Path) -> Path:
    """Where the report on a single file lies."""
    return file.parent / f"{file.name}{COMPANION_SUFFIX}"


def report_folder(shown: Path) -> Path:
    """Where the report of an output lies that is shown, or shelved in a quarantine."""
    return companion_folder(shown) if shown.is_file() else shown


def staged_file(staging: Path, output: Path) -> Path:
    """Where a single file is put together."""
    return staging / "file" / output.name


FOLDER = Folder()
SINGLE_FILE = SingleFile()


def _check_folder(path: Path, remedy: str) -> None:
    if path.is_symlink():
        raise BadInputError(f"output {path} is a symbolic link", remedy)
    if path.exists() and not path.is_dir():
        raise BadInputError(f"output {path} is a file", remedy)
    if path.exists() and any(path.iterdir()):
        raise BadInputError(f"output directory {path} is not empty", remedy)


def _rename_folder(folder: Path, destination: Path) -> None:
    try:
        os.rename(folder, destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "in the way", str(destination)) from error
        raise


def _move_file(file: Path, destination: Path) -> None:
    # A rename would replace what lies there; a second link is refused by the file system itself.
    try:
        os.link(file, destination)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(destination):  # the file system knows no links
            raise FileExistsError(errno.EEXIST, "in the way", str(destination)) from error
        os.rename(file, destination)
        return
    file.unlink()
