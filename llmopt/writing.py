"""What goes to disk: shards of one block each, then the rest, `config.json` and the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from llmopt.checkpoint.durable import write_bytes
from llmopt.checkpoint.ledger import Fate, LedgerEntry
from llmopt.checkpoint.reader import CheckpointReader
from llmopt.checkpoint.structure import ModelStructure
from llmopt.formats.base import Format
from llmopt.solving import SolvedLinear

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard will hold.

    Attributes:
        block: the decoder block, or ``None`` for what lies outside the blocks.
        names: source tensors that end in it, in file order.
    """

    block: int | None
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """The tensors of one shard, and what became of the source tensors behind them."""

    tensors: dict[str, Tensor]
    entries: tuple[LedgerEntry, ...]


def plan_parts(reader: CheckpointReader, structure: ModelStructure) -> tuple[Part, ...]:
    """One part a block, then parts of at most 5 GB for the rest; every source tensor is in one."""
    parts = [
        Part(block, tuple(structure.disk_name(n) for n in structure.block_tensor_names(block)))
        for block in range(structure.num_blocks)
    ]
    inside = {name for part in parts for name in part.names}
    rest: list[str] = []
    size = 0
    for name in reader.names:
        if name in inside:
            continue
        num_bytes = reader.info(name).num_bytes
        if rest and size + num_bytes > MAX_SHARD_BYTES:
            parts.append(Part(None, tuple(rest)))
            rest, size = [], 0
        rest.append(name)
        size += num_bytes
    return (*parts, Part(None, tuple(rest))) if rest else tuple(parts)


def assemble_part(
    part: Part,
    reader: CheckpointReader,
    structure: ModelStructure,
    form: Format,
    solved: Sequence[SolvedLinear],
    scaled: Mapping[str, Tensor],
) -> WrittenPart:
    """The tensors of a part in the output format; what is not quantized is copied as it is.

    ``scaled`` holds, by name, those that a scale was folded into, in the source's element type.
    """
    quantized = {f"{linear.module}.weight": linear for linear in solved}
    tensors: dict[str, Tensor] = {}
    entries: list[LedgerEntry] = []
    for name in part.names:
        if name in quantized:
            linear = quantized[name]
            tensors.update(form.pack(linear.module, linear.tensor))
            fate, reason = Fate.QUANTIZED, f"{linear.record.scheme.name} by {linear.record.solver}"
        elif name in scaled:
            tensors[name] = scaled[name].cpu().contiguous()
            fate, reason = Fate.SCALED, "holds the scales that awq multiplied other weights by"
        elif structure.tied_head and name == structure.head_disk_name:
            fate, reason = Fate.TIED, f"equal to {structure.embed_disk_name}, which serves as head"
        else:
            tensors[name] = reader.read(name)
            fate, reason = Fate.COPIED, _why_copied(name, part, structure)
        info = reader.info(name)
        entries.append(
            LedgerEntry(
                name=name,
                fate=fate,
                reason=reason,
                num_bytes=info.num_bytes,
                num_parameters=info.num_parameters,
            )
        )
    return WrittenPart(tensors, tuple(entries))


def _why_copied(name: str, part: Part, structure: ModelStructure) -> str:
    if name in structure.other_names:
        return "outside the text model"
    if name == structure.embed_disk_name:
        return "embedding table"
    if name == structure.head_disk_name:
        return "output head stays in 16 bit"
    if part.block is None:
        return "outside the decoder blocks"
    return "not a linear layer's weight, or ignored by the recipe"


def write_config(
    directory: Path,
    source_config: Mapping[str, JsonValue],
    form: Format,
    quantization_config: Mapping[str, JsonValue],
) -> None:
    """The source's ``config.json`` with the quantization added.

    Nothing else is changed, but that code which is not carried is not offered (``auto_map``).
    Beside it go the files that the format's readers look for.

    Raises:
        StorageError: if the disk refuses.
    """
    config = {key: value for key, value in source_config.items() if key != "auto_map"}
    config["quantization_config"] = dict(quantization_config)
    files = {"config.json": config, **form.companion_files(quantization_config)}
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_bytes(directory / name, text.encode())
