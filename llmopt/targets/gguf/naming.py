"""What a model is called inside a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import JsonValue

_HUB_PREFIX = "models--"


def model_name(folder: Path, config: Mapping[str, JsonValue]) -> str:
    """``general.name`` of a checkpoint; llama.cpp knows Phi-3 by it, people everything.

    A folder of the hub's cache (``models--ORG--NAME/snapshots/COMMIT``) is called after its model;
    any other by what ``config.json`` says that it was loaded from, then by the folder's name.

    Args:
        folder: of the checkpoint.
        config: its ``config.json``.
    """
    path = folder.resolve()
    given = config.get("_name_or_path")
    origin = PurePosixPath(given.replace("\\", "/")) if isinstance(given, str) else PurePosixPath()
    return _of_hub(path.parts) or _of_hub(origin.parts) or origin.name or path.name


def _of_hub(parts: tuple[str, ...]) -> str | None:
    """The model's name in a path of the hub's cache; ``None`` in any other."""
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith(_HUB_PREFIX):
        return None
    return parts[-3].removeprefix(_HUB_PREFIX).split("--")[-1]
