"""Values of a foreign ``quantization_config``, each held to its type.

JSON spells what Python takes for something else: ``"false"`` is true, ``4.0`` is equal to 4 and a
string is a list of letters. A reader that guesses reads another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pydantic import JsonValue

from llmopt.errors import BadInputError

_MEND = "mend config.json, or take the model from its maker again"


def read_whole(config: Mapping[str, JsonValue], key: str, where: str, default: int) -> int:
    """A whole number, ``default`` where the key is missing.

    Raises:
        BadInputError: if it is anything else, ``4.0``, ``true`` and ``null`` too.
    """
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _other(where, key, value, "a whole number")
    return value


def read_truth(config: Mapping[str, JsonValue], key: str, where: str, default: bool) -> bool:
    """``true`` or ``false``, ``default`` where the key is missing.

    Raises:
        BadInputError: if it is anything else, ``"false"`` and ``null`` too.
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise _other(where, key, value, "true or false")
    return value


def read_names(config: Mapping[str, JsonValue], key: str, where: str) -> tuple[str, ...]:
    """A list of names, empty where the key is missing or ``null``.

    Raises:
        BadInputError: if it is anything else, a single name too.
    """
    value = config.get(key)
    if value is None:
        return ()
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else None
    if names is None or names != value:
        raise _other(where, key, value, "a list of names")
    return tuple(names)


def read_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """A regular expression, compiled.

    Raises:
        BadInputError: if it is none that Python's ``re`` takes.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInputError(
            f"{where}: {pattern!r} is no regular expression: {error}", _MEND
        ) from error


def _other(where: str, key: str, value: JsonValue, expected: str) -> BadInputError:
    return BadInputError(f"{where}: {key} is {json.dumps(value)}, expected {expected}", _MEND)
