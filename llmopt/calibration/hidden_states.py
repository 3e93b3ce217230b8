"""Hidden states of every token between two decoder blocks, in memory-mapped files.

Two files take turns: a block reads its inputs from one and writes its outputs to the other, so a
run killed within a block still has that block's inputs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmopt.errors import BadInputError, StorageError

Shape = tuple[int, int]


class HiddenStates:
    """One memory-mapped file of hidden states: for each batch (batch, tokens, hidden).

    Its pages belong to the file, not to the process: the system may write them out at any time.
    """

    def __init__(self, path: Path, shapes: Sequence[Shape], hidden_size: int, dtype: torch.dtype):
        self.path = path
        self.shapes = tuple(shapes)
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._starts = [0]
        for rows, tokens in self.shapes:
            self._starts.append(self._starts[-1] + rows * tokens)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r+", shape=(self.num_bytes,))
        flat = torch.from_numpy(self._bytes).view(dtype)
        self._states = flat.view(self.num_tokens, hidden_size)

    @staticmethod
    def create(
        path: Path, shapes: Sequence[Shape], hidden_size: int, dtype: torch.dtype
    ) -> HiddenStates:
        """Reserve the whole file now, so that a full disk is an error here and not a fault later.

        Raises:
            StorageError: the disk has no room.
        """
        num_bytes = file_size(shapes, hidden_size, dtype)
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                path.unlink()
                reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
                raise StorageError(
                    f"no room for {num_bytes} bytes of hidden states in {path}: {reason}",
                    "free space, or take fewer or shorter calibration sequences",
                ) from error
        return HiddenStates(path, shapes, hidden_size, dtype)

    @staticmethod
    def open(
        path: Path, shapes: Sequence[Shape], hidden_size: int, dtype: torch.dtype
    ) -> HiddenStates:
        """Map a file that an earlier run wrote.

        Raises:
            BadInputError: it is absent, or not of the size that these shapes need.
        """
        needed = file_size(shapes, hidden_size, dtype)
        found = path.stat().st_size if path.is_file() else None
        if found != needed:
            raise BadInputError(
                f"hidden states {path} "
                + ("are missing" if found is None else f"hold {found} bytes, not {needed}"),
                "start again without resuming",
            )
        return HiddenStates(path, shapes, hidden_size, dtype)

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return len(self.shapes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches."""
        return self._starts[-1]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return file_size(self.shapes, self.hidden_size, self.dtype)

    def read(self, batch: int) -> Tensor:
        """(batch, tokens, hidden), a copy: what a block does in place stays out of the file."""
        rows, tokens = self.shapes[batch]
        return self._part(batch).clone().view(rows, tokens, self.hidden_size)

    def write(self, batch: int, hidden: Tensor) -> None:
        """Store (batch, tokens, hidden), from any device, cast to `dtype`."""
        assert tuple(hidden.shape) == (*self.shapes[batch], self.hidden_size), hidden.shape
        self._part(batch).copy_(hidden.reshape(-1, self.hidden_size))

    def tokens(self, start: int, stop: int) -> Tensor:
        """(stop - start, hidden) of the batches' tokens laid end to end, a copy."""
        return self._states[start:stop].clone()

    def flush(self) -> None:
        """Return when the disk has everything that was written (msync, fsync).

        Raises:
            StorageError: the disk refused.
        """
        try:
            self._bytes.flush()
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"hidden states {self.path} cannot be written: {error.strerror}",
                "check the disk and resume",
            ) from error

    def _part(self, batch: int) -> Tensor:
        return self._states[self._starts[batch] : self._starts[batch + 1]]


@dataclass(frozen=True, slots=True)
class HiddenStatePair:
    """The two files that blocks take turns to read and to write."""

    even: HiddenStates
    odd: HiddenStates

    @staticmethod
    def create(
        directory: Path, shapes: Sequence[Shape], hidden_size: int, dtype: torch.dtype
    ) -> HiddenStatePair:
        """Reserve both files in `directory`; see `HiddenStates.create`."""
        even, odd = (
            HiddenStates.create(path, shapes, hidden_size, dtype) for path in _paths(directory)
        )
        return HiddenStatePair(even, odd)

    @staticmethod
    def open(
        directory: Path, shapes: Sequence[Shape], hidden_size: int, dtype: torch.dtype
    ) -> HiddenStatePair:
        """Map both files of an earlier run; see `HiddenStates.open`."""
        even, odd = (
            HiddenStates.open(path, shapes, hidden_size, dtype) for path in _paths(directory)
        )
        return HiddenStatePair(even, odd)

    def inputs(self, block: int) -> HiddenStates:
        """What block `block` reads; of `num_blocks`, what the final norm reads."""
        return self.odd if block % 2 else self.even

    def outputs(self, block: int) -> HiddenStates:
        """What block `block` writes: the inputs of the next."""
        return self.inputs(block + 1)

    def remove(self) -> None:
        """Delete both files; maps that are still held stay readable."""
        self.even.path.unlink(missing_ok=True)
        self.odd.path.unlink(missing_ok=True)


def file_size(shapes: Sequence[Shape], hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of one file of hidden states."""
    return sum(rows * tokens for rows, tokens in shapes) * hidden_size * dtype.itemsize


def _paths(directory: Path) -> tuple[Path, Path]:
    return directory / "hidden-even.bin", directory / "hidden-odd.bin"
