"""``llmopt.json``: the report for machines, unrounded."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from llmopt.checkpoint.durable import write_bytes
from llmopt.errors import BadInputError
from llmopt.report.schema import JSON_NAME, SCHEMA_VERSION, Report


def write_json(report: Report, directory: Path) -> Path:
    """Write ``llmopt.json`` into ``directory`` in one step and return its path.

    Raises:
        StorageError: if the disk refuses.
    """
    path = directory / JSON_NAME
    write_bytes(path, (report.model_dump_json(indent=1) + "\n").encode())
    return path


def read_json(path: Path) -> Report:
    """Read a report from an ``llmopt.json`` or from the directory that holds one.

    Raises:
        BadInputError: no such file, not JSON, of a newer schema, or not a report.
    """
    file = path / JSON_NAME if path.is_dir() else path
    if not file.is_file():
        raise BadInputError(
            f"{path} holds no {JSON_NAME}", "give a directory that `llmopt quantize` published"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{file} is not JSON: {error}", "restore the file") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BadInputError(f"{file} is no llmopt report", "give the file llmopt wrote")
    if version > SCHEMA_VERSION:
        raise BadInputError(
            f"{file} has report schema {version}; this llmopt reads up to {SCHEMA_VERSION}",
            "upgrade llmopt: pip install -U llmopt",
        )
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInputError(
            f"{file} is not a report of schema {version}: {where}: {first['msg']} "
            f"({error.error_count()} faults)",
            "restore the file, or quantize again",
        ) from error
