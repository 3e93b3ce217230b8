"""Whether an artifact is still the one that was gated."""

from __future__ import annotations

from pathlib import Path

from llmopt.checkpoint.journal import file_sha256
from llmopt.checkpoint.placement import companion_folder
from llmopt.report.schema import REPORT_FILES, FileHash, Report


def hash_files(directory: Path) -> dict[str, FileHash]:
    """Hash every file below ``directory`` except the report's own, in name order.

    A symbolic link counts as what it points to; names have forward slashes.
    """
    return {
        name: FileHash(
            sha256=file_sha256(directory / name), num_bytes=(directory / name).stat().st_size
        )
        for name in _file_names(directory)
    }


def changed_files(directory: Path, report: Report) -> list[str]:
    """What differs from what was gated, one line a file; empty when nothing does.

    Lines read ``changed: NAME``, ``missing: NAME`` or ``added: NAME``, in name order.
    """
    found = set(_file_names(directory))
    lines = []
    for name in sorted(found | report.files.keys()):
        if name not in found:
            lines.append(f"missing: {name}")
        elif name not in report.files:
            lines.append(f"added: {name}")
        elif not _is_same(directory / name, report.files[name]):
            lines.append(f"changed: {name}")
    return lines


def changed_gguf(file: Path, report: Report) -> list[str]:
    """The same of a single file and the folder beside it, which has the report."""
    folder = companion_folder(file)
    beside = {name: known for name, known in report.files.items() if name != file.name}
    lines = changed_files(folder, report.model_copy(update={"files": beside}))
    known = report.files.get(file.name)
    if known is None or not _is_same(file, known):
        lines.append(f"changed: {file.name}")
    return lines


def _file_names(directory: Path) -> list[str]:
    names = (
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )
    return sorted(name for name in names if name not in REPORT_FILES)


def _is_same(path: Path, known: FileHash) -> bool:
    return path.stat().st_size == known.num_bytes and file_sha256(path) == known.sha256
