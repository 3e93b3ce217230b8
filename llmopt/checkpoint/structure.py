"""What a checkpoint is made of: its decoder blocks, found by structure, and their names on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmopt.checkpoint.block_layout import BlockLayout, watch_block
from llmopt.checkpoint.skeleton import Anatomy, build_skeleton, find_anatomy, read_configs
from llmopt.checkpoint.tensor_names import (
    ConfiguredSource,
    check_tensors,
    find_disk_names,
    resolve_head,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """A causal language model without its weights. "Memory names" are those of `skeleton`.

    Attributes:
        config: the whole model's config; of a multimodal wrapper, the wrapper's.
        text_config: the text model's.
        skeleton: the text model as a causal language model on the meta device (float32).
        anatomy: memory names of body, block list, embedding, head and final norm.
        layouts: the linear layers of every block.
        disk_names: memory name -> name in the checkpoint, of every tensor of the text model;
            a tied head has none of its own unless the checkpoint repeats it.
        tied_head: whether the head is the embedding's tensor.
        other_names: checkpoint tensors that are not the text model's (vision tower, MTP, stale
            buffers), in file order.
    """

    config: PreTrainedConfig
    text_config: PreTrainedConfig
    skeleton: PreTrainedModel
    anatomy: Anatomy
    layouts: tuple[BlockLayout, ...]
    disk_names: Mapping[str, str]
    tied_head: bool
    other_names: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self.layouts)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return _table_shape(self.skeleton, self.anatomy.embedding)[1]

    @property
    def vocabulary_size(self) -> int:
        """Rows of the head, and width of the logits."""
        return _table_shape(self.skeleton, self.anatomy.head)[0]

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was made for (``max_position_embeddings``), if it says so."""
        length = getattr(self.text_config, "max_position_embeddings", None)
        return None if length is None else int(length)

    def block_prefix(self, block: int) -> str:
        """The memory name of a block: `model.layers.3`."""
        return f"{self.anatomy.blocks}.{block}"

    def block(self, block: int) -> nn.Module:
        """A block's module on the meta device; not to be changed."""
        return self.skeleton.get_submodule(self.block_prefix(block))

    def disk_name(self, memory_name: str) -> str:
        """The checkpoint's name of a tensor of the text model."""
        return self.disk_names[memory_name]

    def disk_module(self, memory_module: str) -> str:
        """The checkpoint's name of a module that has a weight: `...self_attn.q_proj`."""
        return self.disk_names[f"{memory_module}.weight"].removesuffix(".weight")

    def linear_names(self, block: int) -> tuple[str, ...]:
        """A block's linear layers, relative to it, in order of execution."""
        return self.layouts[block].linear_names

    def input_groups(self, block: int) -> tuple[tuple[str, ...], ...]:
        """The same, grouped where the very same tensor is their input; in order of execution."""
        return self.layouts[block].input_groups

    def waves(self, block: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The input groups that may be calibrated in one pass (:attr:`BlockLayout.waves`)."""
        return self.layouts[block].waves

    def is_in_expert(self, linear: str) -> bool:
        """Whether a linear layer inside a block (by memory name) belongs to an expert."""
        index, _, path = linear.removeprefix(f"{self.anatomy.blocks}.").partition(".")
        return self.layouts[int(index)].expert_of(path) is not None

    def unlisted_matrices(self, block: int) -> tuple[str, ...]:
        """Memory names of a block's modules with a matrix that are no linear layers (routers)."""
        return tuple(
            f"{self.block_prefix(block)}.{path}"
            for path, module in self.block(block).named_modules()
            if not isinstance(module, nn.Linear)
            and isinstance(weight := module._parameters.get("weight"), nn.Parameter)
            and weight.ndim == 2
        )

    def block_tensor_names(self, block: int) -> tuple[str, ...]:
        """Memory names of all tensors of a block."""
        prefix = f"{self.block_prefix(block)}."
        return tuple(name for name in self.disk_names if name.startswith(prefix))

    @property
    def outer_tensor_names(self) -> tuple[str, ...]:
        """Memory names of the text model's tensors outside its blocks."""
        prefix = f"{self.anatomy.blocks}."
        return tuple(name for name in self.disk_names if not name.startswith(prefix))

    @property
    def embed_disk_name(self) -> str:
        """The embedding table's name in the checkpoint."""
        return self.disk_names[f"{self.anatomy.embedding}.weight"]

    @property
    def head_disk_name(self) -> str | None:
        """The head's own tensor in the checkpoint; None where the embedding serves as head."""
        return self.disk_names.get(f"{self.anatomy.head}.weight")


def read_structure(reader: ConfiguredSource) -> ModelStructure:
    """Find the text model in a checkpoint; reads no weights (a repeated tied head excepted).

    Raises:
        BadInputError: unknown architecture, not a chain of decoder blocks, tensors missing or of
            the wrong shape (each named).
    """
    config, text_config = read_configs(reader.config)
    skeleton = build_skeleton(reader.config, text_config)
    anatomy, record = find_anatomy(skeleton)
    head, embedding = f"{anatomy.head}.weight", f"{anatomy.embedding}.weight"
    disk_names = find_disk_names(reader, skeleton, anatomy.body)
    tied_head = text_config.tie_word_embeddings and resolve_head(
        reader, head, embedding, disk_names
    )
    check_tensors(reader, skeleton, disk_names, optional=head if tied_head else None)
    hidden = torch.empty_like(record.hidden, device="meta")
    layouts = tuple(
        watch_block(
            skeleton.get_submodule(f"{anatomy.blocks}.{index}"),
            f"{anatomy.blocks}.{index}",
            call.to("meta"),
            hidden,
        )
        for index, call in enumerate(record.calls)
    )
    used = frozenset(disk_names.values())
    return ModelStructure(
        config=config,
        text_config=text_config,
        skeleton=skeleton,
        anatomy=anatomy,
        layouts=layouts,
        disk_names=disk_names,
        tied_head=tied_head,
        other_names=tuple(name for name in reader.names if name not in used),
    )


def _table_shape(skeleton: nn.Module, module: str) -> torch.Size:
    return skeleton.get_parameter(f"{module}.weight").shape
