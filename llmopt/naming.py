"""Names as the consumers of an artifact look them up, where they are not the checkpoint's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from llmopt.checkpoint.structure import ModelStructure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.quantization.scheme import Scheme


def config_names(structure: ModelStructure, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Schemes by the names that ``quantization_config`` uses; keys are memory names before."""
    return {config_name(structure, name): scheme for name, scheme in schemes.items()}


def ignored_names(
    source: TensorSource, structure: ModelStructure, kept: Iterable[str], *, patterns: bool = True
) -> tuple[str, ...]:
    """Linear layers that are not packed, as ``quantization_config`` lists them.

    Args:
        source: the checkpoint.
        structure: of it.
        kept: memory names of the linear layers inside the blocks that stay in 16 bit.
        patterns: if not, each name is such a part of the names it stands for as all consumers'
            names for them hold: their end; of a component the word for it (vLLM, AutoAWQ), and
            again from the beginning (transformers).

    Returns:
        The head (which engines make a module of even where it is tied), then ``kept``, then
        the routers of mixtures (linear layers to some engines, never quantized here), then what
        lies outside the text model: one pattern for each component of a wrapper (a vision tower),
        and every other matrix (of an MTP layer) by its whole name.
    """
    head = structure.anatomy.head
    names = [head]
    routers = [
        name for block in range(structure.num_blocks) for name in structure.unlisted_matrices(block)
    ]
    kept = [*kept, *routers]
    if not patterns:
        names += [_shared_part(structure, name) for name in kept]
        body = structure.anatomy.body
        for part, pattern in _outside_names(source, structure):
            names.append(part)
            if pattern.startswith("re:"):
                # transformers looks for a component from the beginning of its name in memory.
                names.append(f"{body}.{part}")
        return tuple(dict.fromkeys(names))
    if is_wrapped(structure):
        names.append(f"re:.*\\.{re.escape(head)}$")
    names += [config_name(structure, name) for name in kept]
    names += [pattern for _, pattern in _outside_names(source, structure)]
    return tuple(dict.fromkeys(names))


def config_name(structure: ModelStructure, memory_name: str) -> str:
    """One linear layer's name in ``quantization_config``.

    Where the names in memory and on disk differ, engines look up the one and checkpoint readers
    the other, so the name becomes a pattern that takes both. Of a multimodal wrapper engines
    disagree on the path to the text model as well: the pattern holds what they agree on.
    """
    body = structure.anatomy.body
    inner = re.escape(memory_name.removeprefix(f"{body}."))
    if is_wrapped(structure):
        return f"re:.*{re.escape(_own_components(structure)[0])}.*\\.{inner}$"
    if not _body_path(structure):  # saved as the bare body: `layers.0...`
        return f"re:(?:{re.escape(body)}\\.)?{inner}$"
    return structure.disk_module(memory_name)


def _shared_part(structure: ModelStructure, memory_name: str) -> str:
    """The part of a linear layer's name that consumers agree on."""
    if is_wrapped(structure) or not _body_path(structure):
        return memory_name.removeprefix(f"{structure.anatomy.body}.")
    return structure.disk_module(memory_name)


def is_wrapped(structure: ModelStructure) -> bool:
    """Whether the text model is a part of a multimodal one."""
    return bool(_own_components(structure))


def _own_components(structure: ModelStructure) -> list[str]:
    """What stands in the path to the text model besides what a text model alone has."""
    plain = structure.anatomy.body.split(".")
    return [part for part in _body_path(structure) if part not in plain]


def _body_path(structure: ModelStructure) -> list[str]:
    """The text model's path in the checkpoint: ``language_model.model`` in its parts, or none."""
    memory = structure.block_tensor_names(0)[0]
    inner = memory.removeprefix(f"{structure.anatomy.body}.")
    path = structure.disk_name(memory).removesuffix(inner).removesuffix(".")
    return path.split(".") if path else []


def _outside_names(source: TensorSource, structure: ModelStructure) -> Iterator[tuple[str, str]]:
    """What lies outside the text model: a part of its name, and a pattern for the whole."""
    path = _body_path(structure)
    wrapped = is_wrapped(structure)
    shared = {*path, *structure.anatomy.body.split(".")}
    # A component that is called as a part of the text model would take the text model with it.
    taken = {part for name in structure.disk_names.values() for part in name.split(".")}
    for name in structure.other_names:
        parts = name.split(".")
        own = next((part for part in parts if part not in shared), parts[-1])
        if wrapped and parts[: len(path)] != path and own not in taken:
            yield own, f"re:(?:.*\\.)?{re.escape(own)}(?:\\..*)?$"
        elif len(parts) > 2 and parts[-1] == "weight" and len(source.info(name).shape) == 2:
            yield name.removesuffix(".weight"), name.removesuffix(".weight")
