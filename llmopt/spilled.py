"""Tables that are dequantized once and kept on disk, where reading them again would do it again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmopt.checkpoint.durable import storage_errors
from llmopt.checkpoint.tensor_source import TensorInfo, TensorSource

RowReader = Callable[[slice], Tensor]
"""Gives some rows of one table."""

_ROW_ELEMENTS = 1 << 20  # read at a time


class SpilledSource:
    """``source``, some of whose tensors are read from it once.

    The head is read again for every chunk of logits, the embedding for every batch; as float32
    they may not fit in memory, so they lie in files that lose their names at once, and go there
    some rows at a time.

    Args:
        source: where everything comes from.
        tables: of the tensors to keep, what reads their rows.
        scratch: directory for the files.
    """

    def __init__(
        self, source: TensorSource, tables: Mapping[str, RowReader], scratch: Path
    ) -> None:
        self._source = source
        self._tables = dict(tables)
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
            self._kept[name] = self._spill(self._tables[name], self._source.info(name).shape)
        return self._kept[name]

    def _spill(self, read_rows: RowReader, shape: tuple[int, ...]) -> Tensor:
        num_rows, width = shape
        step = max(1, _ROW_ELEMENTS // width)
        with (
            storage_errors(f"cannot write in {self._scratch}"),
            tempfile.NamedTemporaryFile(dir=self._scratch) as file,
        ):
            for start in range(0, num_rows, step):
                rows = read_rows(slice(start, start + step)).contiguous()
                file.write(rows.view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(
                file.name, shared=False, size=num_rows * width, dtype=rows.dtype
            )
        return mapped.view(shape)
