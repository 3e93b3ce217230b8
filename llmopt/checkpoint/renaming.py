"""What transformers calls a checkpoint's tensors once they are loaded.

transformers 5 renames on loading (Mixtral's ``block_sparse_moe`` is ``mlp`` in memory) and merges
the experts' tensors. Its own table of both (``transformers.conversion_mapping``) is read here, so
that names on disk are what its loader looks up; a merge of experts is taken as a renaming, since
llmopt keeps them apart (``llmopt.checkpoint.experts``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters of a fused experts module, and the layers of one expert that are merged in each."""


@dataclass(frozen=True, slots=True)
class _ExpertMerge:
    """One tensor of every expert on disk (``*`` is which) becomes one tensor in memory."""

    converter: WeightConverter
    parts: tuple[str, ...]

    def rename(self, name: str) -> str | None:
        """``....experts.3.w1.weight`` to ``....experts.3.gate_proj.weight``; None if not one."""
        merged, source = self.converter.rename_source_key(name)
        if source is None:
            return None
        expert = re.search(source.replace("*.", r"(\d+)\."), name)
        if expert is None:
            return None
        part = self.parts[self.converter.source_patterns.index(source)]
        return f"{merged.rpartition('.')[0]}.{expert.group(1)}.{part}.weight"


def memory_names(skeleton: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, str]:
    """What each tensor on disk is called in `skeleton`, wrapper's prefixes aside -> disk name.

    Args:
        skeleton: a causal language model whose experts are linear layers (``split_experts``).
        disk_names: of its checkpoint.
    """
    renamings, merges = _read_conversions(skeleton)
    return {_memory_name(name, renamings, merges): name for name in disk_names}


def _read_conversions(
    skeleton: PreTrainedModel,
) -> tuple[list[WeightRenaming], list[_ExpertMerge]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

    renamings, merges = [], []
    for conversion in get_model_conversion_mapping(skeleton, add_legacy=False):
        if isinstance(conversion, WeightConverter):
            merge = _expert_merge(conversion)
            if merge is not None:
                merges.append(merge)
        # Prefixes are found by what they cover: a checkpoint may have them or not.
        elif isinstance(conversion, WeightRenaming) and not isinstance(conversion, PrefixChange):
            renamings.append(conversion)
    return renamings, merges


def _expert_merge(converter: WeightConverter) -> _ExpertMerge | None:
    """The converter, if it stacks experts and sets their gates above their ups; else None."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    parts = _PARTS.get(converter.target_patterns[0].rpartition(".")[2])
    if parts is None or len(converter.source_patterns) != len(parts):
        return None
    expected = ((MergeModulelist, 0), (Concatenate, 1))[: len(parts)]
    found = tuple((type(step), getattr(step, "dim", None)) for step in converter.operations)
    return _ExpertMerge(converter, parts) if found == expected else None


def _memory_name(name: str, renamings: list[WeightRenaming], merges: list[_ExpertMerge]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for merge in merges:
        merged = merge.rename(name)
        if merged is not None:
            return merged
    return name
