"""Tables that are dequantized once and kept on disk, where reading them again would do it again."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from llmopt.checkpoint.durable import storage_errors
from llmopt.checkpoint.tensor_source import TensorInfo, TensorSource


class SpilledSource:
    """``source``, some of whose tensors are read from it once.

    The head is read again for every chunk of logits, the embedding for every batch; as float32
    they may not fit in memory, so they lie in files that lose their names at once.

    Args:
        source: where everything comes from.
        tables: names of the tensors to keep.
        scratch: directory for the files.
    """

    def __init__(self, source: TensorSource, tables: Collection[str], scratch: Path) -> None:
        self._source = source
        self._tables = frozenset(tables)
        self._scratch = scratch
        self._kept: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """As the source's."""
        return self._source.names

    def info(self, name: str) -> TensorInfo:
        """As the source's."""
        return self._source.info(name)

    def read(self, name: str) -> Tensor:
        """As the source's; of a table, its file, mapped.

        Raises:
            StorageError: if the disk refuses.
        """
        if name not in self._tables:
            return self._source.read(name)
        if name not in self._kept:
            self._kept[name] = self._spill(self._source.read(name).contiguous())
        return self._kept[name]

    def _spill(self, table: Tensor) -> Tensor:
        with (
            storage_errors(f"cannot write in {self._scratch}"),
            tempfile.NamedTemporaryFile(dir=self._scratch) as file,
        ):
            file.write(table.view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=table.numel(), dtype=table.dtype)
        return mapped.view(table.shape)
