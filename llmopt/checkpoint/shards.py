"""Safetensors files written whole: one pass, no copy of the tensors, hashed on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llmopt.checkpoint.checks import INDEX_FILE, SINGLE_FILE
from llmopt.checkpoint.durable import write_bytes, write_whole
from llmopt.checkpoint.safetensors_header import DTYPE_NAMES, METADATA_KEY

CHUNK_BYTES = 1 << 24


class ShardRecord(BaseModel):
    """A shard that is on disk.

    Attributes:
        file: its name in the artifact's directory.
        sha256: of the whole file, hex.
        names: its tensors, in the order of their bytes.
        num_bytes: size of the file.
        num_tensor_bytes: size of its tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    sha256: str
    names: tuple[str, ...]
    num_bytes: int
    num_tensor_bytes: int


def shard_file_name(index: int, count: int) -> str:
    """``model-00001-of-00006.safetensors`` for ``index`` 0 of 6; ``model.safetensors`` for one."""
    assert 0 <= index < count, (index, count)
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> ShardRecord:
    """Writes tensors (any device and strides) as a safetensors file, durably and whole.

    Raises:
        StorageError: if the disk refuses; nothing of it is left then.
    """
    # As the reference writer: wide types first, so that every tensor is aligned to its element.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _header(names, tensors)
    digest = hashlib.sha256()

    def write(sink: Callable[[memoryview], None]) -> None:
        def put(block: memoryview) -> None:
            digest.update(block)
            sink(block)

        put(memoryview(header))
        for name in names:
            flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
            for begin in range(0, flat.numel(), CHUNK_BYTES):
                put(flat[begin : begin + CHUNK_BYTES].cpu().numpy().data)

    write_whole(path, write)
    num_tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return ShardRecord(
        file=path.name,
        sha256=digest.hexdigest(),
        names=tuple(names),
        num_bytes=len(header) + num_tensor_bytes,
        num_tensor_bytes=num_tensor_bytes,
    )


def write_index(directory: Path, records: Sequence[ShardRecord]) -> None:
    """Writes ``model.safetensors.index.json``; a single ``model.safetensors`` needs and gets none.

    Raises:
        StorageError: if the disk refuses.
    """
    if [record.file for record in records] == [SINGLE_FILE]:
        return
    weight_map = {name: record.file for record in records for name in record.names}
    assert len(weight_map) == sum(len(record.names) for record in records), "a name in two shards"
    total_size = sum(record.num_tensor_bytes for record in records)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    content = json.dumps(index, indent=2, sort_keys=True) + "\n"
    write_bytes(directory / INDEX_FILE, content.encode())


def _header(names: Sequence[str], tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {METADATA_KEY: {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        assert name != METADATA_KEY and tensor.dtype in DTYPE_NAMES, (name, tensor.dtype)
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
