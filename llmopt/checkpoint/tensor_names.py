"""Names in memory (transformers' text model) to names on disk (the checkpoint), by structure.

Where an architecture's modules are called otherwise than its checkpoints' tensors, transformers'
own renaming says how (`llmopt.checkpoint.renaming`). A multimodal wrapper, old or new, puts a
prefix before the text model's names (`language_model.model.layers...`,
`model.language_model.layers...`); the prefix that covers most of the text model is the one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from llmopt.checkpoint.renaming import memory_names
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_ROWS = 4096


class ConfiguredSource(TensorSource, Protocol):
    """Named tensors with the `config.json` that says what model they are."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json."""
        ...


def find_body_names(body_names: Collection[str], disk_names: Iterable[str]) -> dict[str, str]:
    """Map the body's names (relative to the body, `layers.0.mlp.up_proj.weight`) to disk names.

    Names that the checkpoint lacks are absent from the result.

    Raises:
        BadInputError: two prefixes on disk both hold a whole text model.
    """
    available = frozenset(disk_names)
    coverage: Counter[str] = Counter()
    for disk_name in available:
        for prefix, suffix in _splits(disk_name):
            if suffix in body_names:
                coverage[prefix] += 1
    if not coverage:
        return {}
    ranked = sorted(coverage, key=lambda prefix: (-coverage[prefix], prefix))
    if len(ranked) > 1 and coverage[ranked[1]] == len(body_names):
        raise BadInputError(
            f"the checkpoint holds two text models, under {ranked[0]!r} and {ranked[1]!r}",
            "keep one of them in the checkpoint",
        )
    prefix = ranked[0]
    return {name: prefix + name for name in body_names if prefix + name in available}


def find_outer_name(name: str, disk_names: Iterable[str]) -> str | None:
    """The disk name of a tensor outside the body (`lm_head.weight`), wherever a wrapper put it."""
    matches = [disk for disk in disk_names if disk == name or disk.endswith(f".{name}")]
    return min(matches, key=lambda disk: (disk.count("."), disk), default=None)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    yield "", name
    start = 0
    while (dot := name.find(".", start)) >= 0:
        start = dot + 1
        yield name[:start], name[start:]


def find_disk_names(source: TensorSource, skeleton: PreTrainedModel, body: str) -> dict[str, str]:
    """Map every memory name of `skeleton` that the checkpoint holds to its disk name.

    Args:
        source: the checkpoint.
        skeleton: the causal language model.
        body: memory name of the module that holds embedding and blocks.
    """
    prefix = f"{body}."
    renamed = memory_names(skeleton, source.names)  # what it is in memory -> what it is on disk
    names = skeleton.state_dict().keys()
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    found = find_body_names(frozenset(inside), renamed)
    disk_names = {prefix + name: renamed[found[name]] for name in inside if name in found}
    for name in names:
        if not name.startswith(prefix):
            outer = find_outer_name(name, renamed)
            if outer is not None:
                disk_names[name] = renamed[outer]
    return disk_names


def resolve_head(
    source: TensorSource, head: str, embedding: str, disk_names: dict[str, str]
) -> bool:
    """Whether a head that the config calls tied is: two different tensors are not (transformers).

    A table that is stored under the head's name alone is entered as the embedding's.
    """
    if embedding not in disk_names and head in disk_names:
        disk_names[embedding] = disk_names.pop(head)
    if head not in disk_names or embedding not in disk_names:
        return True
    first, second = source.read(disk_names[head]), source.read(disk_names[embedding])
    if first.shape != second.shape:
        return False
    return all(
        torch.equal(first[start : start + _CHUNK_ROWS], second[start : start + _CHUNK_ROWS])
        for start in range(0, len(first), _CHUNK_ROWS)
    )


def check_tensors(
    source: ConfiguredSource,
    skeleton: nn.Module,
    disk_names: Mapping[str, str],
    optional: str | None,
) -> None:
    """Compare the checkpoint's tensors with those that `skeleton` needs (`optional` excepted).

    Raises:
        BadInputError: tensors missing, or of the wrong shape; each named.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    missing = [name for name in shapes if name not in disk_names and name != optional]
    architecture = type(skeleton).__name__
    if missing:
        quantized = source.config.get("quantization_config")
        raise BadInputError(
            f"the checkpoint lacks {len(missing)} of the {len(shapes)} tensors of {architecture}: "
            f"{_listed(missing)}",
            "it is already quantized; give the original checkpoint"
            if quantized
            else "complete the download, or correct config.json if it describes another model; "
            "where the experts of a mixture are stored as one tensor, open the checkpoint with "
            "transformers and save it again, which gives each its own",
        )
    wrong = list(_wrong_shapes(source, shapes, disk_names))
    if wrong:
        raise BadInputError(
            f"{len(wrong)} tensors do not have the shape that config.json asks of {architecture}: "
            f"{_listed(wrong)}",
            "correct config.json, or take the checkpoint that belongs to it",
        )


def _wrong_shapes(
    source: TensorSource, shapes: Mapping[str, tuple[int, ...]], disk_names: Mapping[str, str]
) -> Iterator[str]:
    for name, disk_name in disk_names.items():
        found = tuple(source.info(disk_name).shape)
        if found != shapes[name]:
            yield f"{disk_name} {list(found)}, not {list(shapes[name])}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
