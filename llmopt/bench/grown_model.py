"""Grown checkpoints on disk: ``llmopt bench grow``, and the cache that benchmarks take from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmopt.bench.environments import cache_folder, locked
from llmopt.bench.growth import (
    LABEL,
    Growth,
    count_parameters,
    grow_tensor,
    grown_config,
    identity_tensor,
    plan_growth,
)
from llmopt.checkpoint.artifact import check_output, check_space
from llmopt.checkpoint.companions import copy_companions
from llmopt.checkpoint.durable import storage_errors, write_bytes
from llmopt.checkpoint.journal import file_sha256
from llmopt.checkpoint.reader import CheckpointReader, open_checkpoint
from llmopt.checkpoint.shards import shard_file_name, write_index, write_shard
from llmopt.progress import Progress, silent

_BLOCK = re.compile(r"^(.*\.layers\.)(\d+)(\..*)$")


@dataclass(frozen=True, slots=True)
class GrownModel:
    """What was written.

    Attributes:
        folder: of the checkpoint.
        growth: how the source became it.
        num_parameters: of it.
    """

    folder: Path
    growth: Growth
    num_parameters: int


def grow_checkpoint(
    source: Path,
    folder: Path,
    num_parameters: int,
    *,
    positions: int = 0,
    growth: Growth | None = None,
    progress: Progress = silent,
) -> GrownModel:
    """Write the grown model block by block, with the source's tokenizer.

    Args:
        source: folder of a checkpoint in 16 bit or float32.
        folder: absent or empty.
        num_parameters: about so many the grown model will have.
        positions: the least context that it shall allow.
        growth: the shape, where the caller knows it better.
        progress: told of every block.

    Raises:
        BadInputError: a source that cannot be grown (so), or a folder that holds something.
        StorageError: the disk is too small, or refuses.
    """
    reader = open_checkpoint(source)
    shapes = _shapes(reader)
    growth = growth or plan_growth(reader.config, shapes, num_parameters, positions)
    count = count_parameters(shapes, growth)
    check_output(folder)
    check_space(folder, count * max(reader.info(name).dtype.itemsize for name in shapes))
    with storage_errors(f"cannot make {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    num_files = growth.num_blocks + 1
    records = []
    for index, part in enumerate(_parts(reader, growth)):
        progress("parts", index, num_files)
        records.append(write_shard(folder / shard_file_name(index, num_files), part))
    progress("parts", num_files, num_files)
    write_index(folder, records)
    copy_companions(source, folder)
    label = {
        "source": source.resolve().name,
        "source_parameters": count_parameters(shapes, _unchanged(reader.config)),
        "parameters": count,
        "purpose": "benchmarks: computes what its source computes, at this size's cost",
    }
    config = grown_config(reader.config, growth, label)
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return GrownModel(folder, growth, count)


def cached_grown_model(
    source: Path, num_parameters: int, positions: int, progress: Progress = silent
) -> Path:
    """A grown model in ``$XDG_CACHE_HOME/llmopt/bench``; written where it is not there yet.

    Raises:
        BadInputError: as :func:`grow_checkpoint`.
        StorageError: likewise.
    """
    reader = open_checkpoint(source)
    growth = plan_growth(reader.config, _shapes(reader), num_parameters, positions)
    digest = hashlib.sha256(json.dumps([asdict(growth), reader.config], sort_keys=True).encode())
    for file in sorted(source.glob("*.safetensors")):
        digest.update(file_sha256(file).encode())
    size = f"{num_parameters / 1e6:g}m"
    name = f"{source.resolve().name}-grown-{size}-{digest.hexdigest()[:12]}"
    folder = cache_folder() / "bench" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f"{name}.making")
            shutil.rmtree(partial, ignore_errors=True)
            grow_checkpoint(source, partial, num_parameters, positions=positions, progress=progress)
            os.replace(partial, folder)
    return folder


def grown_label(config: Mapping[str, Any]) -> str:
    """What a row calls a grown model; empty for one that is not."""
    label = config.get(LABEL)
    if not label:
        return ""
    return f"{label['source']} grown to {label['parameters'] / 1e6:,.0f} M"


def _shapes(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    """Of all tensors; the head of a tied model, where a file repeats it, is left out."""
    tied = bool(reader.config.get("tie_word_embeddings"))
    return {
        name: tuple(reader.info(name).shape)
        for name in reader.names
        if not (tied and name == "lm_head.weight")
    }


def _parts(reader: CheckpointReader, growth: Growth) -> Iterator[dict[str, Tensor]]:
    """Tensors by shard: each block, then what stands outside the blocks."""
    blocks: dict[int, list[tuple[str, str, str]]] = {}
    outer = []
    for name in _shapes(reader):
        match = _BLOCK.match(name)
        if match is None:
            outer.append(name)
        else:
            blocks.setdefault(int(match[2]), []).append((name, match[1], match[3]))
    for index in range(growth.num_blocks):
        part = {}
        for name, prefix, rest in blocks[index % len(blocks)]:
            tensor = grow_tensor(name, reader.read(name), growth)
            if index >= len(blocks):
                tensor = identity_tensor(name, tensor)
            part[f"{prefix}{index}{rest}"] = tensor
        yield part
    yield {name: grow_tensor(name, reader.read(name), growth) for name in outer}


def _unchanged(config: Mapping[str, Any]) -> Growth:
    return Growth(1, int(config["num_hidden_layers"]), int(config["max_position_embeddings"]))
