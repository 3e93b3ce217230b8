"""What must hold before a GGUF file's first block is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmopt.agreement import Agreement, contract_check
from llmopt.checkpoint.reader import CheckpointReader
from llmopt.checkpoint.structure import ModelStructure
from llmopt.contract import check_patterns, unknown_consumer
from llmopt.errors import BadInputError
from llmopt.formats.consumers import load_consumers
from llmopt.formats.gguf.architectures.plan import FilePlan, plan_file
from llmopt.formats.gguf.imatrix import ImportanceMatrix, check_imatrix, check_seen, read_imatrix
from llmopt.formats.gguf.mixtures import ChosenType
from llmopt.formats.gguf.tokenizer import TokenizerMetadata, tokenizer_metadata
from llmopt.recipe import GGUF, Recipe
from llmopt.report.schema import Consumer, ContractCheck
from llmopt.stages import GGMLSection
from llmopt.targets.gguf.planning import GGUFPlan, choose_types, find_kind

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GGUFContract(Agreement):
    """The contract of a GGUF file.

    Attributes:
        plan: of the file; ``None`` where a check says why there cannot be one.
        imatrix: the importance that the recipe gives.
    """

    plan: GGUFPlan | None
    imatrix: ImportanceMatrix | None


def draw_gguf_contract(
    reader: CheckpointReader, structure: ModelStructure, recipe: Recipe
) -> GGUFContract:
    """Hold source, recipe and consumers against each other; reads no weights.

    Raises:
        ContractError: a consumer that llmopt does not know, a pattern that matches nothing.
        BadInputError: an importance matrix that cannot be read or is of another model.
    """
    stage = recipe.quantize
    check_patterns(stage, _layers(structure))
    file, faults = _try(lambda: plan_file(structure, reader.config))
    checks = [contract_check("architecture", faults, file.architecture if file else "")]
    tokenizer, faults = _try(lambda: tokenizer_metadata(reader.path, structure.vocabulary_size))
    checks.append(contract_check("tokenizer", faults, _tokenizer_detail(tokenizer)))
    plan = None
    if file is not None:
        types, faults = _try(lambda: choose_types(file, stage, reader, structure))
        checks.append(contract_check("types", faults, ""))
        if types is not None and tokenizer is not None:
            plan = _plan(recipe, file, types, tokenizer)
        if types is not None:
            checks[-1] = contract_check("types", [], _types_detail(types))
            checks.append(_tensor_check(reader, structure, file))
    imatrix = _read_importance(recipe, file)
    consumers = tuple(_check_consumer(name, plan) for name in recipe.output.consumers)
    return GGUFContract(tuple(checks), consumers, plan, imatrix)


def _layers(structure: ModelStructure) -> list[str]:
    """What patterns of a recipe may match: linear layers, the embedding and the head."""
    inside = [
        f"{structure.block_prefix(block)}.{linear}"
        for block in range(structure.num_blocks)
        for linear in structure.linear_names(block)
    ]
    return [*inside, structure.anatomy.embedding, structure.anatomy.head]


def _try(make: Callable[[], _T]) -> tuple[_T | None, list[str]]:
    """What was made, or why it cannot be."""
    try:
        return make(), []
    except BadInputError as error:
        return None, [f"{error.what} ({error.remedy})"]


def _plan(
    recipe: Recipe, file: FilePlan, types: dict[str, ChosenType], tokenizer: TokenizerMetadata
) -> GGUFPlan:
    section = recipe.quantize.scheme
    assert isinstance(section, GGMLSection)
    mixture, _ = find_kind(section.type)
    return GGUFPlan(file, mixture, types, tokenizer, section.type)


def _tokenizer_detail(tokenizer: TokenizerMetadata | None) -> str:
    if tokenizer is None:
        return ""
    named = [
        str(value.value)
        for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
        if (value := tokenizer.values.get(key)) is not None
    ]
    return f"{', '.join(named)}: tokenizes the probe texts as the source's does"


def _types_detail(types: dict[str, ChosenType]) -> str:
    counts: dict[str, int] = {}
    for chosen in types.values():
        counts[chosen.type.name] = counts.get(chosen.type.name, 0) + 1
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    fallen = [name for name, chosen in types.items() if chosen.is_fallback]
    if fallen:
        first = types[fallen[0]]
        text += (
            f"; in {len(fallen)} tensors rows are no whole blocks, for example {fallen[0]} "
            f"({first.type.name} instead of {first.wanted.name}), as llama.cpp does it"
        )
    return text


def _tensor_check(
    reader: CheckpointReader, structure: ModelStructure, file: FilePlan
) -> ContractCheck:
    left = f", {len(file.dropped)} of the checkpoint's left out" if file.dropped else ""
    head = "; the embedding serves as head" if structure.tied_head else ""
    return contract_check(
        "tensors", [], f"{len(file.tensors)} from {len(reader.names)}{left}{head}"
    )


def _read_importance(recipe: Recipe, file: FilePlan | None) -> ImportanceMatrix | None:
    given = recipe.calibration.imatrix
    if given is None or file is None:
        return None
    matrix = read_imatrix(Path(given))
    matrices = ((t.gguf_name, t.shape) for t in file.tensors if t.is_matrix)
    check_imatrix(matrix, matrices, Path(given))
    check_seen(matrix, Path(given))
    return matrix


def _check_consumer(name: str, plan: GGUFPlan | None) -> Consumer:
    known = load_consumers()
    if name not in known:
        raise unknown_consumer(name)
    support = known[name].gguf
    if support is None:
        check = contract_check("format", [f"it does not open GGUF: {known[name].lacks[GGUF]}"], "")
        return Consumer(name=name, version=known[name].version, checks=(check,))
    checks: tuple[ContractCheck, ...] = ()
    if plan is not None:
        types = {chosen.type.name for chosen in plan.types.values()}
        architecture = plan.file.architecture
        how = "run" if support.proven(architecture, types) else "read, not run"
        other = support.architecture_refusal(architecture)
        unread = support.type_refusal(types)
        checks = (
            contract_check("architecture", [other] if other else [], f"opens it ({how})"),
            contract_check("types", [unread] if unread else [], "opens all of them"),
        )
    return Consumer(name=name, version=support.version, checks=checks)
