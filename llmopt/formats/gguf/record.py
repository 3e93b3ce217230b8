"""The two metadata texts that are overwritten in place: the tensors' hash and the verdict.

``llmopt.tensor_data.sha256`` is 64 hexadecimal digits: SHA-256 of all bytes from the first tensor's
to the file's end, padding included. ``llmopt.verdict`` is a JSON object, padded with spaces to 1024
bytes; ``{}`` until the gate has spoken. Both have a fixed length so that neither moves a tensor:
what the gate measured stays, byte for byte, what is published. Readers take the padding for part of
a JSON text, which it may be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from llmopt.checkpoint.durable import storage_errors
from llmopt.errors import BadInputError
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.values import TypedValue, ValueType, string

VERDICT_KEY = "llmopt.verdict"
TENSOR_DATA_KEY = "llmopt.tensor_data.sha256"
VERDICT_BYTES = 1024
_HASH_DIGITS = 64
_CHUNK_BYTES = 1 << 24


def blank_records() -> dict[str, TypedValue]:
    """Both texts before there is anything to say."""
    return {
        VERDICT_KEY: string("{}".ljust(VERDICT_BYTES)),
        TENSOR_DATA_KEY: string("0" * _HASH_DIGITS),
    }


def set_verdict(path: Path, verdict: Mapping[str, JsonValue]) -> None:
    """Write a verdict into a file of llmopt's, over the one that is there.

    Raises:
        BadInputError: the file has no room for one, or the verdict is longer than 1024 bytes.
        StorageError: if the disk refuses.
    """
    text = json.dumps(verdict, separators=(",", ":"), allow_nan=False)
    if len(text.encode()) > VERDICT_BYTES:
        raise BadInputError(
            f"the verdict for {path} has {len(text.encode())} bytes as JSON, and the file has room "
            f"for {VERDICT_BYTES}",
            "shorten it; the whole report belongs into the folder beside the file",
        )
    _overwrite(path, VERDICT_KEY, text.ljust(VERDICT_BYTES).encode())


def set_tensor_data_hash(path: Path, digest: str) -> None:
    """Write the hash of the tensors' bytes; what was written before it is made durable, too."""
    assert len(digest) == _HASH_DIGITS
    _overwrite(path, TENSOR_DATA_KEY, digest.encode())


def read_verdict(file: GGUFFile) -> dict[str, JsonValue] | None:
    """The verdict in a file; ``{}`` before the gate, None in a file that is not llmopt's.

    Raises:
        BadInputError: there is one, but not as JSON.
    """
    text = file.metadata.get(VERDICT_KEY)
    if text is None:
        return None
    try:
        verdict = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        verdict = None
    if not isinstance(verdict, dict):
        raise BadInputError(
            f"{file.path}: {VERDICT_KEY} is not a JSON object",
            "the file was changed after llmopt wrote it; take the original",
        )
    return verdict


def check_tensor_data(path: Path) -> str:
    """Hold a file's tensor bytes against the hash inside it.

    Returns:
        The hash.

    Raises:
        BadInputError: no hash, or another one: the tensors were changed.
    """
    file = GGUFFile(path)
    expected = file.metadata.get(TENSOR_DATA_KEY)
    if not isinstance(expected, str):
        raise BadInputError(
            f"{path} has no {TENSOR_DATA_KEY}", "only files that llmopt wrote can be checked"
        )
    found = _hash_from(path, file.header.data_offset)
    if found != expected:
        raise BadInputError(
            f"the tensors of {path} are not those that llmopt wrote: their SHA-256 is {found}, "
            f"and the file says {expected}",
            "download the file again",
        )
    return found


def has_intact_tensors(path: Path) -> bool:
    """Whether a file's tensor bytes are those that its hash was made of; False without a hash."""
    file = GGUFFile(path)
    return file.metadata.get(TENSOR_DATA_KEY) == _hash_from(path, file.header.data_offset)


def _hash_from(path: Path, offset: int) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}: {error.strerror}", "check the disk, then try again"
        ) from error
    return digest.hexdigest()


def _overwrite(path: Path, key: str, content: bytes) -> None:
    """Replace a text by one of the same length, durably."""
    header = GGUFFile(path).header
    old = header.metadata.get(key)
    if header.value_types.get(key) is not ValueType.STRING or not isinstance(old, str):
        raise BadInputError(
            f"{path} has no {key}", "only files that llmopt wrote have room for one"
        )
    if len(old.encode()) != len(content):
        raise BadInputError(
            f"{key} of {path} has {len(old.encode())} bytes, not {len(content)}",
            "it was changed by another tool; write the file anew",
        )
    with storage_errors(f"cannot write {path}"):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, content, header.value_offsets[key] + 8)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
