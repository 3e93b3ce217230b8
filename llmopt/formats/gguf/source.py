"""A GGUF file, seen as the Hugging Face checkpoint that it could have been written from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.checkpoint.tensor_source import TensorInfo
from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures.config import family_of_file, rebuild_config
from llmopt.formats.gguf.architectures.plan import block_transform
from llmopt.formats.gguf.architectures.tables import Family
from llmopt.formats.gguf.architectures.transforms import Transform
from llmopt.formats.gguf.file import GGUFFile
from llmopt.quantization.ggml.packing import unpack_blocks, unpack_plain
from llmopt.quantization.ggml.types import GGMLType

_SHARED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d*)\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the checkpoint is in the file: one of a stack's experts, or all of it."""

    gguf_name: str
    shape: tuple[int, ...]
    transform: Transform = Transform()
    expert: int = 0


class GGUFSource:
    """A :class:`TensorSource` with Hugging Face's names, values and config.

    Rows of q and k are put back in their order, stacks of experts taken apart, norms have one
    subtracted where the model adds it. Everything is float32: types of blocks are dequantized on
    reading, and nothing is kept between reads.

    Attributes:
        file: the parsed file.
        path: of the file.
        config: a ``config.json`` rebuilt from the metadata.

    Args:
        path: a ``.gguf`` file.

    Raises:
        BadInputError: an unsound file; an architecture that llmopt does not know; tensors that it
            has no place for; metadata missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        family = family_of_file(self.file.metadata, str(path))
        _refuse_parts(self.file)
        factors = {
            f"{name}.weight": self._values(f"{name}.weight").reshape(-1).tolist()
            for name in family.rotary_tensors
            if f"{name}.weight" in self.file.names
        }
        self.config: Mapping[str, Any] = rebuild_config(
            family,
            self.file.metadata,
            str(path),
            self.file.names,
            self.file.info("token_embd.weight").shape[0],
            factors,
        )
        self._places = dict(self._find_places(family, frozenset(factors)))

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face's names, in the order of the file."""
        return tuple(self._places)

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """The modules whose weights are stored in blocks, in the order of the file."""
        return tuple(
            name.removesuffix(".weight")
            for name, place in self._places.items()
            if not self.file.info(place.gguf_name).type.is_plain
        )

    def scheme_of(self, module: str) -> GGMLType:
        """How a module's weight is stored; ``KeyError`` if there is none of that name."""
        return self.file.info(self._places[f"{module}.weight"].gguf_name).type

    def gguf_name(self, name: str) -> str:
        """The tensor of the file that holds one of the checkpoint's."""
        return self._places[name].gguf_name

    def info(self, name: str) -> TensorInfo:
        """What :meth:`read` will give."""
        shape = self._places[name].shape
        num_bytes = math.prod(shape) * torch.float32.itemsize
        return TensorInfo(torch.float32, shape, num_bytes, self.path)

    def read(self, name: str) -> Tensor:
        """The tensor as float32, dequantized where it is stored in blocks."""
        place = self._places[name]
        stored = self.file.info(place.gguf_name)
        rows = self.file.data(place.gguf_name)
        if place.transform.stacked:
            rows = rows[place.expert]
        values = _dequantize(rows, stored.type, stored.shape[-1]).reshape(place.shape)
        unstacked = Transform(heads=place.transform.heads, added=place.transform.added)
        return unstacked.invert(values)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a table as float32: of a matrix whose rows lie as the checkpoint has them.

        Nothing but these rows is dequantized.
        """
        place = self._places[name]
        assert place.transform == Transform(), name
        stored = self.file.info(place.gguf_name)
        return _dequantize(self.file.data(place.gguf_name)[rows], stored.type, stored.shape[-1])

    def _values(self, gguf_name: str) -> Tensor:
        info = self.file.info(gguf_name)
        return _dequantize(self.file.data(gguf_name), info.type, info.shape[-1])

    def _find_places(self, family: Family, without: frozenset[str]) -> Iterator[tuple[str, _Place]]:
        """Each tensor of the checkpoint, and where it is."""
        patterns = {base: pattern for pattern, base in family.block_names.items()}
        for gguf_name in self.file.names:
            shape = self.file.info(gguf_name).shape
            found = _BLOCK.fullmatch(gguf_name)
            if gguf_name in without:
                continue
            if gguf_name in _SHARED:
                added = family.added_to_norms if len(shape) == 1 else 0.0
                yield _SHARED[gguf_name], _Place(gguf_name, shape, Transform(added=added))
            elif found is not None and found.group(2) in patterns:
                block, base, kind = found.groups()
                yield from self._block_places(family, block, patterns[base], kind, gguf_name)
            else:
                raise BadInputError(
                    f"{self.path} has a tensor {gguf_name}, which llmopt has no place for in "
                    f"a {family.architecture} model",
                    "convert the model anew, or read it with llama.cpp",
                )

    def _block_places(
        self, family: Family, block: str, pattern: str, kind: str, gguf_name: str
    ) -> Iterator[tuple[str, _Place]]:
        shape = self.file.info(gguf_name).shape
        heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        transform = block_transform(family, pattern, kind, *heads)
        self._check_rows(gguf_name, shape, transform)
        module = family.disk_names.get(pattern, pattern)
        prefix = f"model.layers.{block}."
        if not transform.stacked:
            yield f"{prefix}{module}.{kind}", _Place(gguf_name, shape, transform)
            return
        for expert in range(shape[0]):
            name = f"{prefix}{module.replace('*', str(expert))}.{kind}"
            yield name, _Place(gguf_name, shape[1:], transform, expert)

    def _check_rows(self, gguf_name: str, shape: tuple[int, ...], transform: Transform) -> None:
        experts = self.config.get("num_experts", self.config.get("num_local_experts"))
        odd = transform.heads is not None and shape[0] % (2 * transform.heads)
        if odd or (transform.stacked and (len(shape) != 3 or shape[0] != experts)):
            raise BadInputError(
                f"{self.path}: {gguf_name} {list(shape)} does not fit the heads or experts that "
                "the metadata says",
                "convert the model anew",
            )


def _refuse_parts(file: GGUFFile) -> None:
    """Raise where the file is not a whole model."""
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise BadInputError(
            f"{file.path} is one of {file.metadata['split.count']} files of a model",
            "merge them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )
    table = file.header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise BadInputError(
            f"{file.path} has no matrix token_embd.weight: it is no whole language model",
            "give the model's own file, not its vocabulary, adapter or projector",
        )


def _dequantize(rows: Tensor, kind: GGMLType, width: int) -> Tensor:
    """Packed rows ``(..., row_bytes) uint8`` as values ``(rows, width) float32``."""
    flat = rows.reshape(-1, rows.shape[-1])
    if kind.is_plain:
        return unpack_plain(flat, kind).to(torch.float32)
    return unpack_blocks(flat, kind, width).dequantize()
