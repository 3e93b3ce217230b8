"""What a GGUF file of a model will hold, and from which tensors of the checkpoint it is made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.checkpoint.structure import ModelStructure
from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures.metadata import (
    PlannedMetadata,
    find_family,
    plan_metadata,
)
from llmopt.formats.gguf.architectures.tables import SHARED_NAMES, Family
from llmopt.formats.gguf.architectures.transforms import Transform
from llmopt.formats.gguf.values import TypedValue

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the file.

    Attributes:
        gguf_name: its name there.
        shape: as torch has it, the row's width last.
        sources: tensors of the checkpoint (disk names), one for each expert of a stack; none for
            a constant.
        transform: from the sources' values or packed rows to the file's.
        constant: of a tensor without sources, its values.
    """

    gguf_name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transform: Transform = Transform()
    constant: tuple[float, ...] | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it may be of another type than float32: a matrix, or one for each expert."""
        return len(self.shape) > 1

    def assemble(self, parts: Sequence[Tensor] = ()) -> Tensor:
        """The file's tensor.

        Args:
            parts: the sources' tensors in the order of ``sources``; values, or, where
                ``transform.keeps_rows``, packed rows ``(rows, row_bytes) uint8``.

        Returns:
            Values of ``shape``, or packed rows ``(..., row_bytes) uint8``.
        """
        if self.constant is not None:
            return torch.tensor(self.constant, dtype=torch.float32)
        return self.transform.apply(parts)


@dataclass(frozen=True, slots=True)
class DroppedTensor:
    """A tensor of the checkpoint (disk name) that the file does without, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a choice of element types depends on.

    Attributes:
        architecture: llama.cpp's name.
        num_blocks: decoder blocks.
        num_heads: query heads.
        num_key_value_heads: heads of k and v.
        num_experts: of a mixture; 0 for none.
    """

    architecture: str
    num_blocks: int
    num_heads: int
    num_key_value_heads: int
    num_experts: int


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file, tokenizer and element types aside.

    Attributes:
        architecture: llama.cpp's name, ``general.architecture``.
        metadata: all values but that one, the tokenizer's, ``general.file_type`` and
            ``general.quantization_version``.
        tensors: in the order of the file: embedding, blocks, head.
        dropped: all tensors of the checkpoint that are no tensor's source.
        facts: for :func:`llmopt.formats.gguf.mixtures.tensor_types`.
        notes: what a person should know of it, for the report.
    """

    architecture: str
    metadata: Mapping[str, TypedValue]
    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[DroppedTensor, ...]
    facts: ModelFacts
    notes: tuple[str, ...] = ()


def plan_file(structure: ModelStructure, config: Mapping[str, JsonValue]) -> FilePlan:
    """Plan the file of a checkpoint's text model.

    Args:
        structure: of the checkpoint.
        config: its ``config.json``.

    Raises:
        BadInputError: a quantized checkpoint; a model that llama.cpp, or llmopt's table of it, has
            no equivalent for: what it is stands in the message.
    """
    if config.get("quantization_config"):
        raise BadInputError(
            "the checkpoint is already quantized (quantization_config)",
            "give the original checkpoint: a second rounding adds to the first",
        )
    text = structure.text_config
    family = find_family(text)
    planned = plan_metadata(family, text, structure.vocabulary_size)
    facts = ModelFacts(
        family.architecture,
        structure.num_blocks,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.num_local_experts if family.has_experts else 0,
    )
    tensors = tuple(_plan_tensors(family, structure, planned))
    return FilePlan(
        architecture=family.architecture,
        metadata=planned.values,
        tensors=tensors,
        dropped=tuple(_find_dropped(structure, tensors)),
        facts=facts,
        notes=planned.notes,
    )


def _plan_tensors(
    family: Family, structure: ModelStructure, planned: PlannedMetadata
) -> Iterator[PlannedTensor]:
    anatomy = structure.anatomy
    yield _shared(family, structure, anatomy.embedding, SHARED_NAMES["embedding"])
    for name, values in planned.factors.items():
        yield PlannedTensor(name, (len(values),), (), constant=values)
    for block in range(structure.num_blocks):
        yield from _plan_block(family, structure, block)
    yield _shared(family, structure, anatomy.final_norm, SHARED_NAMES["final_norm"])
    if not structure.tied_head:
        if family.tied_head:
            raise BadInputError(
                "the head is not the embedding, and llama.cpp's "
                f"{family.architecture} always takes the embedding for it",
                "write another format",
            )
        yield _shared(family, structure, anatomy.head, SHARED_NAMES["head"])
    elif family.own_head:
        yield _shared(family, structure, anatomy.embedding, SHARED_NAMES["head"])


def _shared(
    family: Family, structure: ModelStructure, module: str, gguf_base: str
) -> PlannedTensor:
    name = f"{module}.weight"
    shape = tuple(structure.skeleton.get_parameter(name).shape)
    added = family.added_to_norms if len(shape) == 1 else 0.0
    return PlannedTensor(
        f"{gguf_base}.weight", shape, (structure.disk_names[name],), Transform(added=added)
    )


def _plan_block(family: Family, structure: ModelStructure, block: int) -> Iterator[PlannedTensor]:
    prefix = f"{structure.block_prefix(block)}."
    ranks = {module: rank for rank, module in enumerate(family.block_names)}
    grouped: dict[tuple[int, str, str], list[tuple[int, str]]] = {}
    for memory_name in structure.block_tensor_names(block):
        module, _, kind = memory_name.removeprefix(prefix).rpartition(".")
        found = _EXPERT.search(f".{module}.")
        expert = int(found.group(1)) if found else 0
        pattern = _EXPERT.sub(".experts.*.", f"{module}.").removesuffix(".")
        _refuse_unknown_tensor(family, memory_name, pattern, kind)
        grouped.setdefault((ranks[pattern], pattern, kind), []).append((expert, memory_name))
    for (_, pattern, kind), members in sorted(grouped.items()):
        names = [name for _, name in sorted(members)]
        yield _plan_block_tensor(family, structure, block, pattern, kind, names)


def _refuse_unknown_tensor(family: Family, memory_name: str, pattern: str, kind: str) -> None:
    if pattern not in family.block_names or kind not in ("weight", "bias"):
        raise BadInputError(
            f"llama.cpp's {family.architecture} has no place for {memory_name}",
            "write another format",
        )
    if kind == "bias" and family.block_names[pattern] not in family.biases:
        raise BadInputError(
            f"llama.cpp's {family.architecture} ignores {memory_name}",
            "write another format: without it the model computes something else",
        )


def _plan_block_tensor(
    family: Family,
    structure: ModelStructure,
    block: int,
    pattern: str,
    kind: str,
    memory_names: Sequence[str],
) -> PlannedTensor:
    shape = tuple(structure.skeleton.get_parameter(memory_names[0]).shape)
    stacked = "*" in pattern
    base = family.block_names[pattern]
    return PlannedTensor(
        f"blk.{block}.{base}.{kind}",
        (len(memory_names), *shape) if stacked else shape,
        tuple(structure.disk_names[name] for name in memory_names),
        block_transform(
            family,
            pattern,
            kind,
            structure.text_config.num_attention_heads,
            structure.text_config.num_key_value_heads,
        ),
    )


def block_transform(
    family: Family, pattern: str, kind: str, num_heads: int, num_key_value_heads: int
) -> Transform:
    """What happens to a tensor of a decoder block.

    Args:
        family: of the model.
        pattern: the module in the block, ``*`` for an expert's number.
        kind: ``weight`` or ``bias``.
        num_heads: query heads.
        num_key_value_heads: heads of k and v.
    """
    heads = {"attn_q": num_heads, "attn_k": num_key_value_heads}.get(family.block_names[pattern])
    is_norm = pattern.endswith("norm") and kind == "weight"
    return Transform(
        heads=heads if family.permuted else None,
        stacked="*" in pattern,
        added=family.added_to_norms if is_norm else 0.0,
    )


def _find_dropped(
    structure: ModelStructure, tensors: Sequence[PlannedTensor]
) -> Iterator[DroppedTensor]:
    used = {name for tensor in tensors for name in tensor.sources}
    for name in structure.disk_names.values():
        if name not in used:
            assert name == structure.head_disk_name, name
            yield DroppedTensor(name, "the embedding, which it repeats, serves as head")
    for name in structure.other_names:
        yield DroppedTensor(name, "not a tensor of the text model")
