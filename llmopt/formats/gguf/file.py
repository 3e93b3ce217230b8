"""A GGUF file, memory-mapped: its metadata, and its tensors as packed rows."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.formats.gguf.header import GGUFTensorInfo, Header, parse_header
from llmopt.formats.gguf.values import PlainValue

# Linux counts a private writable mapping against the memory it may commit otherwise; Python 3.11
# has no name for the flag.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class GGUFFile:
    """A parsed file; a tensor of it is a view, and its pages are page cache.

    The mapping is private: what is written into a tensor by mistake never reaches the file.

    Attributes:
        path: the file.
        header: all that stands before the tensors' bytes.

    Args:
        path: a ``.gguf`` file.

    Raises:
        BadInputError: it cannot be read, or is not sound (:func:`parse_header`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping = map_file(path)
        self.header: Header = parse_header(path, self._mapping)

    @property
    def metadata(self) -> Mapping[str, PlainValue]:
        """The values: numbers, texts, numpy arrays of numbers, tuples of texts."""
        return self.header.metadata

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the order of their bytes."""
        return tuple(self.header.tensors)

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return len(self._mapping)

    def info(self, name: str) -> GGUFTensorInfo:
        """Type, shape and place of a tensor; ``KeyError`` if there is none of that name."""
        return self.header.tensors[name]

    def data(self, name: str) -> Tensor:
        """A tensor's bytes, a view of the mapping.

        Returns:
            ``(rows, row_bytes) uint8``; one row for a vector; ``(experts, rows, row_bytes)`` for
            three dimensions.
        """
        info = self.info(name)
        flat = torch.frombuffer(
            self._mapping, dtype=torch.uint8, count=info.num_bytes, offset=info.offset
        )
        return flat.view(*(info.shape[:-1] or (1,)), info.row_bytes)


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, without reading them; what is written into them stays in memory.

    Raises:
        BadInputError: it cannot be read, or has none.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except ValueError:  # mmap's word for a file of no bytes
        raise BadInputError(f"{path} is empty", "download or convert the file again") from None
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}: {error.strerror}", "give the path of a file"
        ) from error
