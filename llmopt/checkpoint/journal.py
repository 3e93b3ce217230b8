"""The journal of a staged artifact: which blocks are done, rewritten whole after each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from llmopt.checkpoint.durable import write_bytes
from llmopt.checkpoint.shards import ShardRecord
from llmopt.errors import BadInputError, Outcome

_CHUNK_BYTES = 1 << 24


class BlockEntry(BaseModel):
    """A block (or another part of the model) whose shard is on disk.

    Attributes:
        index: its place in the journal, from 0.
        shard: the file.
        digests: what the round trip compares, by name.
        payload: whatever else the pipeline needs of it after a resume.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    shard: ShardRecord
    digests: dict[str, str] = {}
    payload: dict[str, JsonValue] = {}


class Conclusion(BaseModel):
    """The verdict that an artifact is being moved under, and where to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Outcome
    destination: str


class JournalState(BaseModel):
    """Everything the journal file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    fingerprint: dict[str, str]
    blocks: tuple[BlockEntry, ...] = ()
    conclusion: Conclusion | None = None


class Journal:
    """A state and the file that holds it; every change is on disk when the call returns.

    Each change raises ``StorageError`` if the disk refuses; the state is as before then.
    """

    def __init__(self, path: Path, state: JournalState) -> None:
        self.path = path
        self._state = state

    @property
    def state(self) -> JournalState:
        """The state that is on disk."""
        return self._state

    @property
    def blocks(self) -> tuple[BlockEntry, ...]:
        """The blocks that are done."""
        return self._state.blocks

    def append(self, entry: BlockEntry) -> None:
        """Records a block as done; call it when its shard and its outputs are on disk."""
        assert entry.index == len(self.blocks), (entry.index, len(self.blocks))
        self._write(blocks=(*self.blocks, entry))

    def keep_blocks(self, count: int) -> None:
        """Forgets the blocks from ``count`` on."""
        self._write(blocks=self.blocks[:count])

    def conclude(self, conclusion: Conclusion | None) -> None:
        """Records that the artifact is about to be moved, or that it is not after all."""
        self._write(conclusion=conclusion)

    def _write(self, **changes: object) -> None:
        state = self._state.model_copy(update=changes)
        write_state(self.path, state)
        self._state = state


def write_state(path: Path, state: JournalState) -> None:
    """Writes the journal file, durably and whole.

    Raises:
        StorageError: if the disk refuses; the file is as before then.
    """
    write_bytes(path, state.model_dump_json(indent=1).encode() + b"\n")


def read_state(path: Path) -> JournalState:
    """Reads the journal file.

    Raises:
        BadInputError: if it is not a journal of this version of llmopt.
    """
    try:
        return JournalState.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise BadInputError(
            f"{path} is not a journal that this llmopt reads: {error}",
            f"remove {path.parent} and start again without --resume",
        ) from error


def check_fingerprint(state: JournalState, fingerprint: Mapping[str, str], staging: Path) -> None:
    """Holds that the interrupted run and this one would write the same bytes.

    Raises:
        BadInputError: listing the entries that differ.
    """
    then = state.fingerprint
    differing = [
        f"{key}: then {then.get(key, '(not recorded)')}, now {fingerprint.get(key, '(absent)')}"
        for key in sorted(then.keys() | fingerprint.keys())
        if then.get(key) != fingerprint.get(key)
    ]
    if differing:
        raise BadInputError(
            f"cannot resume {staging}: the interrupted run differs from this one in "
            + "; ".join(differing),
            f"run it as it was run then, or remove {staging} and start again without --resume",
        )


def count_intact_blocks(state: JournalState, directory: Path) -> int:
    """How many blocks, from the first on, have their shard on disk as it was recorded."""
    for count, entry in enumerate(state.blocks):
        path = directory / entry.shard.file
        if not path.is_file() or path.stat().st_size != entry.shard.num_bytes:
            return count
        if file_sha256(path) != entry.shard.sha256:
            return count
    return len(state.blocks)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
