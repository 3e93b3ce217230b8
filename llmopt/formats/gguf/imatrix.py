"""llama.cpp's importance matrices: how much each column of a weight matters.

An importance is the mean of the square of a matrix's input, column by column, over tokens. Two
layouts are in use. The GGUF one (``tools/imatrix/imatrix.cpp``, since 2025) has, for each weight,
``<name>.in_sum2``, sums of squares ``(matrices, columns)``, and ``<name>.counts``, tokens seen
``(matrices, 1)``: of a stack of experts, one row and one count each. The legacy one (``.dat``) has,
for each weight, a name, a number of calls and float32 values, which over the calls are the
importance.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.formats.gguf.file import GGUFFile, map_file
from llmopt.formats.gguf.header import MAGIC
from llmopt.formats.gguf.values import TypedValue, string, strings, uint32
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.types import GGML_TYPES

_SUMS, _COUNTS = ".in_sum2", ".counts"
_UNWEIGHTED = ("token_embd.weight", "output.weight")  # llama-imatrix leaves them out by default
_MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class ImportanceEntry:
    """The inputs of one weight.

    Attributes:
        sums: ``(matrices, columns) float32``, sums of squares; one matrix, or one for each expert.
        counts: ``(matrices,) int64``, tokens that they were summed over; an expert may have none.
    """

    sums: Tensor
    counts: Tensor

    def importance(self) -> Tensor:
        """``(matrices, columns) float32``: mean squares; ones for an expert that saw no token."""
        counts = self.counts[:, None]
        return torch.where(counts > 0, self.sums / counts.clamp(min=1), torch.ones(()))


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """The entries of a file.

    Attributes:
        entries: by the weight's name in the GGUF file: ``blk.0.attn_q.weight``.
        datasets: what the text was called.
        num_chunks: chunks of text that were run.
        chunk_tokens: tokens of a chunk; 0 in the legacy layout, which does not say.
    """

    entries: Mapping[str, ImportanceEntry]
    datasets: tuple[str, ...]
    num_chunks: int
    chunk_tokens: int

    def importance(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """How much each column of a weight matters.

        Args:
            name: of the weight in the GGUF file.
            shape: of the weight there.

        Returns:
            ``(columns,) float32``, of a stack ``(experts, columns)``; None where there is no entry.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        # The legacy layout has the experts' columns one after the other.
        return entry.importance().reshape(*shape[:-2], shape[-1])


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read a file in either layout.

    Raises:
        BadInputError: it cannot be read, is neither, is truncated, or holds what is no importance
            (negative, NaN, infinite, sums without counts).
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}: {error.strerror}", "give the path of an importance matrix"
        ) from error
    matrix = _read_gguf(path) if start == MAGIC else _read_legacy(path)
    if not matrix.entries:
        raise _not_one(path, "it has no entries")
    for name, entry in matrix.entries.items():
        if not torch.isfinite(entry.sums).all() or (entry.sums < 0).any():
            raise _not_one(path, f"the sums of {name} are negative, NaN or infinite")
    return matrix


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write a file in the GGUF layout, whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    metadata: dict[str, TypedValue] = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings(matrix.datasets or ("",)),
        "imatrix.chunk_count": uint32(matrix.num_chunks),
        "imatrix.chunk_size": uint32(matrix.chunk_tokens),
    }
    values: dict[str, Tensor] = {}
    for name, entry in sorted(matrix.entries.items()):
        values[name + _SUMS] = entry.sums.to(torch.float32)
        values[name + _COUNTS] = entry.counts.to(torch.float32)[:, None]
    entries = [
        TensorEntry(name, GGML_TYPES["F32"], tuple(tensor.shape)) for name, tensor in values.items()
    ]
    write_gguf(
        path,
        None,
        metadata,
        entries,
        lambda entry: values[entry.name].contiguous().view(torch.uint8),
        with_records=False,
    )


def check_imatrix(
    matrix: ImportanceMatrix, tensors: Iterable[tuple[str, tuple[int, ...]]], path: Path
) -> None:
    """Hold a matrix against the matrices of a file that is to be written.

    Args:
        matrix: what was read.
        tensors: names and shapes of the file's matrices, vectors left out.
        path: of the matrix, for the message.

    Raises:
        BadInputError: entries of other names or widths, or matrices of a block without one; lists
            them. The embedding and the head may go without.
    """
    shapes = dict(tensors)
    problems = [f"{name} is no matrix of this model" for name in matrix.entries.keys() - shapes]
    for name, shape in shapes.items():
        entry = matrix.entries.get(name)
        if entry is None:
            if name not in _UNWEIGHTED and not name.endswith("ffn_gate_inp.weight"):
                problems.append(f"{name} has no entry")
            continue
        experts = shape[0] if len(shape) > 2 else 1
        found = tuple(entry.sums.shape)
        if found not in ((experts, shape[-1]), (1, experts * shape[-1])):
            problems.append(f"{name} is {list(found)}, not {[experts, shape[-1]]}")
    if problems:
        more = f"; {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise BadInputError(
            f"the importance matrix {path} does not fit this model: "
            f"{'; '.join(sorted(problems)[:_MAX_LISTED])}{more}",
            "take the matrix that was collected from this very model",
        )


def check_seen(matrix: ImportanceMatrix, path: Path) -> None:
    """Hold that every expert was routed a token of the text that a matrix was collected from.

    Raises:
        BadInputError: lists the experts that saw none; to weigh all their columns alike would be a
            guess that nobody asked for.
    """
    unseen = {
        name: [int(expert) for expert in (entry.counts == 0).nonzero()]
        for name, entry in sorted(matrix.entries.items())
        if bool((entry.counts == 0).any())
    }
    if unseen:
        shown = [f"{name} {experts}" for name, experts in list(unseen.items())[:_MAX_LISTED]]
        more = f"; {len(unseen) - _MAX_LISTED} more" if len(unseen) > _MAX_LISTED else ""
        raise BadInputError(
            f"the text of the importance matrix {path} never reached the experts "
            f"{'; '.join(shown)}{more}",
            "collect it from more text, or round without it (`importance: false`)",
        )


def _not_one(path: Path, why: str) -> BadInputError:
    return BadInputError(
        f"{path} is not an importance matrix of llama.cpp's: {why}",
        "give what llama-imatrix or llmopt wrote",
    )


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GGUFFile(path)
    sums = {name.removesuffix(_SUMS): name for name in file.names if name.endswith(_SUMS)}
    counts = {name.removesuffix(_COUNTS): name for name in file.names if name.endswith(_COUNTS)}
    if len(sums) + len(counts) != len(file.names):
        raise _not_one(path, "it has tensors that end in neither .in_sum2 nor .counts")
    if sums.keys() != counts.keys():
        odd = sorted(sums.keys() ^ counts.keys())
        raise _not_one(path, f"{odd[0]} has sums or counts, but not both")
    entries = {name: _read_entry(file, name) for name in sums}
    datasets = file.metadata.get("imatrix.datasets", ())
    return ImportanceMatrix(
        entries,
        tuple(str(name) for name in datasets) if isinstance(datasets, tuple) else (),
        _natural(file, "imatrix.chunk_count"),
        _natural(file, "imatrix.chunk_size"),
    )


def _natural(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key, 0)
    return value if isinstance(value, int) else 0


def _read_entry(file: GGUFFile, name: str) -> ImportanceEntry:
    for part in (name + _SUMS, name + _COUNTS):
        if file.info(part).type.name != "F32":
            raise _not_one(file.path, f"{part} is {file.info(part).type.name}, not F32")
    columns = file.info(name + _SUMS).shape[-1]
    sums = file.data(name + _SUMS).contiguous().view(torch.float32).reshape(-1, columns)
    counts = file.data(name + _COUNTS).contiguous().view(torch.float32).reshape(-1)
    if not torch.isfinite(counts).all() or (counts < 0).any():
        raise _not_one(file.path, f"the counts of {name} are negative, NaN or infinite")
    if len(counts) == 1:  # older files count a stack of experts once
        counts = counts.expand(len(sums))
    if len(counts) != len(sums):
        raise _not_one(file.path, f"{name} has {len(sums)} rows of sums and {len(counts)} counts")
    return ImportanceEntry(sums.clone(), counts.round().to(torch.int64))


class _LegacyBytes:
    """The legacy layout's integers, names and values, each held against what is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._raw = map_file(path)
        self._offset = 0

    @property
    def at_end(self) -> bool:
        return self._offset == len(self._raw)

    def take(self, count: int, size: int, what: str) -> bytes:
        """`count` items of `size` bytes."""
        end = self._offset + count * size
        if count < 0 or end > len(self._raw):
            left = len(self._raw) - self._offset
            raise _not_one(
                self._path, f"{what} of {count} items at byte {self._offset}, {left} left"
            )
        taken = self._raw[self._offset : end]
        self._offset = end
        return taken

    def integer(self, what: str) -> int:
        """Four bytes, signed."""
        (number,) = struct.unpack("<i", self.take(1, 4, what))
        return int(number)

    def text(self, what: str) -> str:
        """A length and bytes."""
        return self.take(self.integer(what), 1, what).decode("utf-8", errors="replace")


def _read_legacy(path: Path) -> ImportanceMatrix:
    raw = _LegacyBytes(path)
    entries: dict[str, ImportanceEntry] = {}
    for _ in range(raw.integer("a number of entries")):
        name = raw.text("a name")
        if name in entries:
            raise _not_one(path, f"{name} stands twice")
        calls = raw.integer("a number of calls")
        content = raw.take(raw.integer("a number of values"), 4, "values")
        if not content:
            raise _not_one(path, f"{name} has no values")
        sums = torch.frombuffer(bytearray(content), dtype=torch.float32)[None, :]
        entries[name] = ImportanceEntry(sums, torch.tensor([max(calls, 1)]))
    num_chunks, dataset = 0, ""
    if not raw.at_end:  # older files end here
        num_chunks = raw.integer("a number of chunks")
        dataset = raw.text("a name of a text")
    return ImportanceMatrix(entries, (dataset,) if dataset else (), max(num_chunks, 0), 0)
