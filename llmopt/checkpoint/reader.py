"""A Hugging Face checkpoint directory, checked before work and read tensor by tensor."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.checkpoint.checks import (
    INDEX_FILE,
    check_config,
    check_index,
    find_shards,
    read_json_object,
)
from llmopt.checkpoint.safetensors_header import TensorPlace, read_header
from llmopt.checkpoint.tensor_source import TensorInfo, TensorSource
from llmopt.errors import BadInputError

# Python 3.11 has no name for it; Linux counts a private writable mapping against the memory
# it may commit otherwise, and refuses to map a shard larger than the machine's memory.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A safetensors file, mapped whole; a tensor of it is a view, and its pages are page cache.

    The mapping is private: what is written into a tensor by mistake never reaches the file.

    Raises:
        BadInputError: on opening, if the file is not sound (see ``read_header``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, TensorPlace] = read_header(path)
        self._mapping: mmap.mmap | None = None

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and size of a tensor."""
        place = self.places[name]
        return TensorInfo(place.dtype, place.shape, place.num_bytes, self.path)

    def read(self, name: str) -> Tensor:
        """The tensor: a view of the mapping, or a copy where its bytes are not aligned."""
        place = self.places[name]
        if place.num_bytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        if self._mapping is None:
            self._mapping = self._map()
        count = place.num_bytes // place.dtype.itemsize
        if place.offset % place.dtype.itemsize:
            raw = bytearray(self._mapping[place.offset : place.offset + place.num_bytes])
            return torch.frombuffer(raw, dtype=place.dtype).view(place.shape)
        flat = torch.frombuffer(self._mapping, dtype=place.dtype, count=count, offset=place.offset)
        return flat.view(place.shape)

    def _map(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        except OSError as error:
            raise BadInputError(
                f"cannot map {self.path}: {error.strerror}",
                "check that the file is still there and that the limit on address space "
                "(ulimit -v) holds it",
            ) from error


class CheckpointReader(TensorSource):
    """The tensors of a checkpoint directory; made by ``open_checkpoint``.

    Attributes:
        path: the directory.
        config: ``config.json`` as it stands.
        shards: file name of each shard, in order, with the names of its tensors.
    """

    def __init__(
        self, path: Path, config: dict[str, JsonValue], files: dict[str, MappedFile]
    ) -> None:
        self.path = path
        self.config = config
        self.shards: dict[str, tuple[str, ...]] = {
            name: tuple(file.places) for name, file in files.items()
        }
        self._file_of = {name: file for file in files.values() for name in file.places}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, shard after shard, in the order of their bytes."""
        return tuple(self._file_of)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape, size and file of a tensor; ``KeyError`` if there is none."""
        return self._file_of[name].info(name)

    def read(self, name: str) -> Tensor:
        """The tensor, memory-mapped: touching some rows reads those pages and no others."""
        return self._file_of[name].read(name)


def open_checkpoint(path: Path) -> CheckpointReader:
    """Opens a checkpoint directory; everything that can be told from its headers is checked now.

    Raises:
        BadInputError: no directory or no ``config.json``; weights missing, pickled, truncated or
            in two places; an index that disagrees with its shards; a model that needs remote code.
    """
    config = check_config(path)
    files = {name: MappedFile(path / name) for name in find_shards(path)}
    held = {name: tuple(file.places) for name, file in files.items()}
    index_path = path / INDEX_FILE
    check_index(index_path, read_json_object(index_path) if index_path.exists() else None, held)
    if not any(held.values()):
        raise BadInputError(f"{path} holds no tensor", "give the path of a complete checkpoint")
    return CheckpointReader(path, config, files)
