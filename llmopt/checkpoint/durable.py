"""Files that are there whole or not at all: write aside, fsync, rename, fsync the directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmopt.errors import StorageError

TEMPORARY_SUFFIX = ".llmopt-tmp"

_REMEDIES = {
    errno.ENOSPC: "free space on that disk or choose another output; --resume then continues",
    errno.EDQUOT: "the quota is spent: free space or choose another output; --resume continues",
    errno.EFBIG: "the file size limit (ulimit -f, or the file system's) is too small",
    errno.ENAMETOOLONG: "choose a shorter name for the output",
    errno.EROFS: "that file system is read-only: choose another output",
    errno.EACCES: "you may not write there: choose another output or change its permissions",
    errno.EPERM: "you may not write there: choose another output or change its permissions",
}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turns an ``OSError`` inside into a ``StorageError`` that begins with ``what``."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk, then continue with --resume")
        raise StorageError(f"{what}: {error.strerror or error}", remedy) from error


def fsync_path(path: Path) -> None:
    """Makes a file's bytes, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """``fsync_path`` for a directory and everything below it, deepest first."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in sorted(files):
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))


def write_whole(path: Path, write: Callable[[Callable[[memoryview], None]], None]) -> None:
    """Calls ``write(sink)`` on a temporary file beside ``path`` and renames it onto ``path``.

    Raises:
        StorageError: if the disk refuses; the temporary file is gone and ``path`` is as it was.
    """
    temporary = path.parent / f".{path.name}{TEMPORARY_SUFFIX}"
    with storage_errors(f"cannot write {path}"):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                write(lambda block: _write_all(descriptor, block))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            fsync_path(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """``write_whole`` of one piece."""
    write_whole(path, lambda sink: sink(memoryview(content)))


def _write_all(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]
