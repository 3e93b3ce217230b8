"""The files of a checkpoint that are no weights, carried byte for byte."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmopt.checkpoint.checks import PICKLE_SUFFIXES
from llmopt.checkpoint.durable import storage_errors
from llmopt.checkpoint.journal import file_sha256
from llmopt.errors import BadInputError, StorageError

_OTHER_WEIGHTS = PICKLE_SUFFIXES | {
    ".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".npy",
    ".tflite", ".mlmodel", ".engine", ".nemo",
}  # fmt: skip
_WRITTEN_ANEW = frozenset({"config.json", "quantize_config.json", "quant_config.json"})
_REPORTS = frozenset({"llmopt.json", "report.html", "conversion.json"})
_RENAMED = {"README.md": "README.source.md"}  # README.md will be the model card of the output
_CHUNK_BYTES = 1 << 24


class CompanionRecord(BaseModel):
    """A file that was carried; ``source_file`` differs from ``file`` where it was renamed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    source_file: str
    sha256: str
    num_bytes: int


class LeftOut(BaseModel):
    """A file or directory of the source that was not carried, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Companions:
    """What was carried and what was not, by name."""

    copied: tuple[CompanionRecord, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class CompanionPlan:
    """What would be carried: paths relative to the source, and their size."""

    files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    num_bytes: int


def plan_companions(source: Path) -> CompanionPlan:
    """Sorts the source's files into those to carry and those not; reads none of them.

    Raises:
        BadInputError: for a link that leads nowhere.
    """
    files: list[str] = []
    left_out: list[LeftOut] = []
    num_bytes = 0
    for folder, subfolders, names in os.walk(source):
        relative = Path(folder).relative_to(source)
        for name in sorted(subfolders):
            path, reason = relative / name, _folder_reason(Path(folder) / name)
            if reason is not None:
                left_out.append(LeftOut(file=f"{path}/", reason=reason))
                subfolders.remove(name)
        subfolders.sort()
        for name in sorted(names):
            path, reason = relative / name, _file_reason(relative / name)
            if reason is not None:
                left_out.append(LeftOut(file=str(path), reason=reason))
                continue
            if not (source / path).exists():
                raise BadInputError(
                    f"{source / path} is a link to a file that is not there",
                    "download the checkpoint again, completely",
                )
            files.append(str(path))
            num_bytes += (source / path).stat().st_size
    taken = {_RENAMED[file] for file in files if file in _RENAMED} & set(files)
    for file in sorted(taken):
        files.remove(file)
        left_out.append(LeftOut(file=file, reason="the source's README.md takes this name"))
    return CompanionPlan(tuple(files), tuple(left_out), num_bytes)


def copy_companions(source: Path, destination: Path) -> Companions:
    """Copies every non-weight file of a checkpoint and reads each copy back.

    ``config.json`` is the pipeline's to write; ``README.md`` becomes ``README.source.md``.

    Raises:
        BadInputError: a link that leads nowhere, or a file that cannot be read.
        StorageError: if the disk refuses, or gives back other bytes than were written.
    """
    plan = plan_companions(source)
    copied = tuple(
        _copy(source, file, destination / _RENAMED.get(file, file), destination)
        for file in plan.files
    )
    return Companions(copied, plan.left_out)


def _copy(source: Path, file: str, target: Path, destination: Path) -> CompanionRecord:
    digest = hashlib.sha256()
    num_bytes = 0
    try:
        reading = (source / file).open("rb")
    except OSError as error:
        raise BadInputError(
            f"cannot read {source / file}: {error.strerror}", "check its permissions"
        ) from error
    with reading, storage_errors(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as writing:
            while block := reading.read(_CHUNK_BYTES):
                digest.update(block)
                num_bytes += len(block)
                writing.write(block)
    if file_sha256(target) != digest.hexdigest():
        raise StorageError(
            f"{target} does not hold the bytes that were written", "check that disk for faults"
        )
    return CompanionRecord(
        file=str(target.relative_to(destination)),
        source_file=file,
        sha256=digest.hexdigest(),
        num_bytes=num_bytes,
    )


def _folder_reason(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink():
        return "a link to a directory"
    if path.name == "original":
        return "weights in another layout"
    if path.name == "__pycache__":
        return "Python code is not carried"
    return None


def _file_reason(relative: Path) -> str | None:
    name = relative.name
    if name.startswith("."):
        return "hidden"
    if relative.suffix in {".py", ".pyc"}:
        return "Python code is not carried"
    if name.endswith(".index.json") or str(relative) in _WRITTEN_ANEW:
        return "written anew for the output"
    if str(relative) in _REPORTS:
        return "a report on the source"
    if name == "model.safetensors" or name.startswith("model-") and name.endswith(".safetensors"):
        return "the weights themselves: see the ledger"
    if relative.suffix in _OTHER_WEIGHTS:
        return "weights in another format or layout"
    return None
