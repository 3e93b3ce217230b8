"""What must hold before the first block is read; refused in a second, not after an hour."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from pydantic import JsonValue

from llmopt.agreement import Agreement, contract_check
from llmopt.checkpoint.reader import CheckpointReader
from llmopt.checkpoint.structure import ModelStructure
from llmopt.errors import BadInputError, ContractError
from llmopt.formats import FORMATS, choose_format
from llmopt.formats.base import Format
from llmopt.formats.consumers import FormatSupport, Shard, load_consumers
from llmopt.formats.kv_cache import attention_names
from llmopt.kv_cache.settings import KVCacheSettings
from llmopt.quantization.scheme import Scheme
from llmopt.recipe import OutputSection, QuantizeStage, Recipe, matches
from llmopt.report.schema import Consumer, ContractCheck
from llmopt_evals.long_context import first_judged


@dataclass(frozen=True, slots=True)
class Contract(Agreement):
    """The contract of a checkpoint directory.

    Attributes:
        form: the format on disk.
        schemes: of every linear layer that will be quantized, by memory name, blocks only.
        kept: memory names of the linear layers that stay in 16 bit, blocks only.
    """

    form: Format
    schemes: Mapping[str, Scheme]
    kept: tuple[str, ...]


def draw_contract(reader: CheckpointReader, structure: ModelStructure, recipe: Recipe) -> Contract:
    """Hold source, recipe and target consumers against each other; reads no weights.

    Raises:
        ContractError: a format or consumer that llmopt does not know, an override that matches
            nothing. What is known but does not fit is in ``Contract.refusals``.
    """
    stage = recipe.quantize
    form = _format(recipe.output)
    linears = [
        f"{structure.block_prefix(block)}.{linear}"
        for block in range(structure.num_blocks)
        for linear in structure.linear_names(block)
    ]
    check_patterns(stage, linears)
    assigned = {name: stage.scheme_for(name) for name in linears}
    schemes = {name: scheme for name, scheme in assigned.items() if scheme is not None}
    checks = (
        contract_check(
            "format", _format_faults(form, structure, schemes), f"{form.name} holds every scheme"
        ),
        contract_check("solver", _solver_faults(stage, schemes), f"{stage.solver} can solve them"),
        contract_check("groups", _group_faults(structure, schemes), "groups divide every layer"),
        contract_check("tensors", [], _tensor_summary(reader, structure, schemes)),
        contract_check("something to do", [] if schemes else ["every layer is ignored"], "yes"),
        *_cache_checks(structure, recipe.quantized_cache),
    )

    def dtype_of(name: str) -> torch.dtype:
        return reader.info(structure.disk_name(f"{name}.weight")).dtype

    ranks = recipe.output.tensor_parallel_size
    consumers = tuple(
        check_consumer(
            name, reader.config, structure, form, assigned, dtype_of, ranks, recipe.quantized_cache
        )
        for name in recipe.output.consumers
    )
    kept = tuple(name for name in linears if name not in schemes)
    return Contract(checks, consumers, form, schemes, kept)


def _cache_checks(
    structure: ModelStructure, cache: KVCacheSettings | None
) -> tuple[ContractCheck, ...]:
    """That every block has an attention whose keys and values a cache can hold."""
    if cache is None:
        return ()
    faults = []
    try:
        attention_names(structure)
    except BadInputError as error:
        faults.append(error.what)
    context = structure.context_length
    if context is not None and first_judged(context) < cache.first_quantized:
        faults.append(
            f"pages of {cache.page_size} and a window of {cache.recent_window} leave nothing "
            f"quantized for some of the positions that a context of {context} is judged on"
        )
    return (contract_check("kv cache", faults, f"{cache.label}; llmopt.decoding takes it"),)


def _format(output: OutputSection) -> Format:
    name = output.format
    if name not in FORMATS:
        raise ContractError(
            f"unknown output format {name!r}{_nearest(name, list(FORMATS))}",
            f"choose one of {', '.join(FORMATS)}",
        )
    return choose_format(name, output.checkpoint_format)


def check_patterns(stage: QuantizeStage, linears: list[str]) -> None:
    """Refuse a pattern of ``ignore`` or an override that matches none of the layers named.

    Raises:
        ContractError: names it, and the nearest layer.
    """
    # The head is never quantized, so that ignoring it is a habit and no mistake.
    ignored = [pattern for pattern in stage.ignore if pattern != "lm_head"]
    for pattern in [*ignored, *(override.match for override in stage.overrides)]:
        if not any(matches(pattern, name) for name in linears):
            raise ContractError(
                f"the pattern {pattern!r} matches no linear layer{_nearest(pattern, linears)}",
                f"patterns are matched against names such as {linears[0]!r}",
            )


def _format_faults(
    form: Format, structure: ModelStructure, schemes: Mapping[str, Scheme]
) -> list[str]:
    refusals = {scheme: form.refusal(scheme) for scheme in set(schemes.values())}
    faults = [f"{form.name} cannot hold {s.name}: {why}" for s, why in refusals.items() if why]
    if why := form.mixture_refusal(set(schemes.values())):
        faults.append(f"{form.name} cannot hold these schemes together: {why}")
    shapes: dict[str, str] = {}
    for name, scheme in schemes.items():
        if why := form.shape_refusal(scheme, _shape(structure, name)):
            shapes.setdefault(why, name)
    return faults + [f"{form.name} cannot hold {name}: {why}" for why, name in shapes.items()]


def _solver_faults(stage: QuantizeStage, schemes: Mapping[str, Scheme]) -> list[str]:
    orders = {scheme.activation_order for scheme in schemes.values()}
    if stage.solver == "rtn" and "group" in orders:
        return ["rtn sees no activations, so it cannot form groups by activation order"]
    if stage.solver == "gptq" and "weight" in orders and not stage.static_groups:
        return ["activation_order: weight needs static_groups: true"]
    return []


def _group_faults(structure: ModelStructure, schemes: Mapping[str, Scheme]) -> list[str]:
    faults = []
    for name, scheme in schemes.items():
        try:
            scheme.columns_per_group(_shape(structure, name)[1])
        except BadInputError as error:
            faults.append(f"{name}: {error.what}")
    return faults


def _tensor_summary(
    reader: CheckpointReader, structure: ModelStructure, schemes: Mapping[str, Scheme]
) -> str:
    copied = len(reader.names) - len(schemes)
    head = "tied to the embedding" if structure.tied_head else "copied in 16 bit"
    others = len(structure.other_names)
    beside = f", {others} of them outside the text model" if others else ""
    return f"{len(schemes)} quantized, {copied} kept{beside}; lm_head {head}"


def check_consumer(
    name: str,
    config: Mapping[str, JsonValue],
    structure: ModelStructure,
    form: Format,
    assigned: Mapping[str, Scheme | None],
    dtype_of: Callable[[str], torch.dtype],
    tensor_parallel_size: int,
    cache: KVCacheSettings | None = None,
) -> Consumer:
    """Hold a model that is to be quantized so against what one consumer opens.

    Args:
        name: the consumer's.
        config: the model's ``config.json``.
        structure: of the model.
        form: the format on disk.
        assigned: scheme of every linear layer in the blocks, by memory name; ``None`` is 16 bit.
        dtype_of: element type of a layer's scales, by the same name.
        tensor_parallel_size: its ranks.
        cache: the quantized cache that the model is to be judged with.

    Raises:
        ContractError: nobody knows such a consumer.
    """
    known = load_consumers()
    if name not in known:
        raise unknown_consumer(name)
    support = known[name].formats.get(form.name)
    if support is None:
        lacks = known[name].lacks[form.name]
        check = contract_check("format", [f"it does not open {form.name}: {lacks}"], "")
        return Consumer(name=name, version=known[name].version, checks=(check,))
    schemes = {name: scheme for name, scheme in assigned.items() if scheme is not None}
    kernel_faults: dict[str, None] = {}
    for members in _shared_inputs(structure):
        shard = _shard(structure, members)
        for layer in _layers_there(support, schemes, members):
            in_features = _shape(structure, layer[0])[1]
            out_features = sum(_shape(structure, member)[0] for member in layer)
            for dtype in dict.fromkeys(map(dtype_of, layer)):
                faults = support.refusals(
                    schemes[layer[0]],
                    in_features,
                    out_features,
                    tensor_parallel_size,
                    dtype,
                    shard=shard,
                )
                kernel_faults.update(dict.fromkeys(faults))
    mixture = support.mixture_refusal(schemes.values())
    variant = support.checkpoint_format_refusal(form.checkpoint_format, schemes.values())
    kept = support.kept_refusal([name for name in assigned if name not in schemes])
    misread = support.config_refusal(config)
    checks = [
        contract_check("format", [variant] if variant else [], "opens it"),
        contract_check("config", [misread] if misread else [], "reads config.json"),
        contract_check("kernels", list(kernel_faults), _proof(support, schemes)),
        contract_check(
            "schemes together", [mixture] if mixture else [], "may stand in one checkpoint"
        ),
        contract_check("16-bit layers", [kept] if kept else [], "found by their names"),
    ]
    blocks = [found for found in _expert_schemes(structure, assigned) if found]
    if blocks:
        dense = {s for name, s in schemes.items() if not structure.is_in_expert(name)}
        proof = "run" if support.experts and support.experts.proven(blocks) else "read, not run"
        faults = support.expert_refusals(blocks, dense)
        checks.append(
            contract_check("experts", faults, f"opens them as one layer a block ({proof})")
        )
    if cache is not None:
        checks.append(contract_check("kv cache", [], support.cache_words(cache)))
    if support.fuses_shared_inputs:
        mixed = list(_mixed_groups(structure, assigned))
        checks.append(contract_check("fused layers", mixed, "one scheme for q/k/v and for gate/up"))
    return Consumer(name=name, version=support.version, checks=tuple(checks))


def unknown_consumer(name: str) -> ContractError:
    """The error for a consumer that nobody knows."""
    known = list(load_consumers())
    return ContractError(
        f"unknown consumer {name!r}{_nearest(name, known)}", f"choose among {', '.join(known)}"
    )


def _proof(support: FormatSupport, schemes: Mapping[str, Scheme]) -> str:
    if all(support.proven(scheme) for scheme in schemes.values()):
        return "a kernel exists for every layer"
    return "a kernel exists for every layer (read in the engine's source, not run)"


def _shared_inputs(structure: ModelStructure) -> Iterator[tuple[str, ...]]:
    for block in range(structure.num_blocks):
        prefix = structure.block_prefix(block)
        for group in structure.input_groups(block):
            yield tuple(f"{prefix}.{linear}" for linear in group)


def _layers_there(
    support: FormatSupport, schemes: Mapping[str, Scheme], members: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """The quantized layers of a shared input as a consumer has them: each one, or fused.

    Those that it fuses but that differ in scheme are refused for that; each scheme counts here.
    """
    quantized = [member for member in members if member in schemes]
    if not support.fuses_shared_inputs:
        return [(member,) for member in quantized]
    fused: dict[Scheme, tuple[str, ...]] = {}
    for member in quantized:
        fused[schemes[member]] = (*fused.get(schemes[member], ()), member)
    return list(fused.values())


def _shard(structure: ModelStructure, members: tuple[str, ...]) -> Shard:
    """The dimension that ranks divide of the layers that share an input.

    Engines split what reads the hidden states by output rows, and what writes them (o and down,
    which share their input with nothing) by columns. Phi-3's fused q/k/v is alone but writes wider.
    """
    writes_hidden = _shape(structure, members[0])[0] == structure.hidden_size
    return "in" if len(members) == 1 and writes_hidden else "out"


def _expert_schemes(
    structure: ModelStructure, assigned: Mapping[str, Scheme | None]
) -> Iterator[set[Scheme | None]]:
    """The schemes among each block's experts; empty for a block without experts."""
    for block in range(structure.num_blocks):
        names = (
            f"{structure.block_prefix(block)}.{linear}" for linear in structure.linear_names(block)
        )
        yield {assigned[name] for name in names if structure.is_in_expert(name)}


def _mixed_groups(
    structure: ModelStructure, assigned: Mapping[str, Scheme | None]
) -> Iterator[str]:
    for members in _shared_inputs(structure):
        found = {assigned[member] for member in members}
        if len(found) > 1:
            names = ", ".join(scheme.label if scheme else "16 bit" for scheme in found)
            yield f"{', '.join(members)} are one layer there but have {names}"


def _shape(structure: ModelStructure, name: str) -> tuple[int, int]:
    rows, columns = structure.skeleton.get_parameter(f"{name}.weight").shape
    return rows, columns


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""
