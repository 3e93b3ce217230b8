"""What a conversion would do, held against its target before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmopt.agreement import Agreement
from llmopt.checkpoint.reader import CheckpointReader, open_checkpoint
from llmopt.checkpoint.scan import combined_digest, tensor_digest
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.contract import check_consumer, unknown_consumer
from llmopt.errors import BadInputError, ContractError, Outcome
from llmopt.formats import choose_format
from llmopt.formats.base import Format
from llmopt.formats.consumers import load_consumers
from llmopt.formats.dequantized import DequantizedSource
from llmopt.formats.kv_cache import read_settings
from llmopt.formats.parts import trivial_groups
from llmopt.progress import Progress, silent
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme
from llmopt.report.json_file import read_json
from llmopt.report.schema import JSON_NAME, Consumer


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that can be done exactly; nothing is written yet.

    Attributes:
        reader: the checkpoint to convert.
        source: the same, dequantized.
        structure: of it.
        form: the format, and variant, to write.
        schemes: of the output, by disk name of each quantized linear layer.
        assigned: the same by memory name, ``None`` for a linear layer kept in 16 bit.
        codes: digest of each quantized weight in its output scheme, by disk name.
        copied: digest of every other tensor, by name.
        consumers: that the output was held to.
        gated: the verdict on the source, ``None`` if llmopt gave none.
    """

    reader: CheckpointReader
    source: DequantizedSource
    structure: ModelStructure
    form: Format
    schemes: Mapping[str, Scheme]
    assigned: Mapping[str, Scheme | None]
    codes: Mapping[str, str]
    copied: Mapping[str, str]
    consumers: tuple[Consumer, ...]
    gated: Outcome | None

    @property
    def sha256(self) -> str:
        """Content hash of all that is converted."""
        return combined_digest({**self.copied, **self.codes})


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found of one quantized weight of the source."""

    scheme: Scheme
    shape: tuple[int, int]
    scale_dtype: torch.dtype
    all_midpoint: bool
    some_zero: bool
    trivial: bool


def plan_conversion(
    directory: Path | str,
    to: str,
    *,
    checkpoint_format: str | None = None,
    consumers: Sequence[str] = (),
    tensor_parallel_size: int = 1,
    progress: Progress = silent,
) -> Conversion:
    """Read the whole source and hold it against the target; nothing is written.

    Args:
        directory: a checkpoint in any format that llmopt reads, from any tool.
        to: the format to write.
        checkpoint_format: of ``gptq``: ``gptq`` or ``gptq_v2``.
        consumers: who must be able to open the output; without a word all that can.
        tensor_parallel_size: ranks of the consumers.
        progress: told of every tensor.

    Raises:
        ContractError: the target cannot hold the source exactly, or a consumer would refuse it.
        BadInputError: a source that cannot be read, its report included, or that is in that
            format already.
    """
    form = choose_format(to, checkpoint_format)
    _refuse_readers_of_others(form, consumers)
    reader = open_checkpoint(Path(directory))
    gated = _read_verdict(reader.path)
    source = DequantizedSource(reader)
    if (source.form.name, source.form.checkpoint_format) == (form.name, form.checkpoint_format):
        raise BadInputError(
            f"{directory} is in the format {to} already",
            "choose another format, or use it as it is",
        )
    if (cache := read_settings(reader.config)) is not None:
        raise ContractError(
            f"{directory} is for an {cache.label} cache, which a conversion would lose",
            "quantize the source anew with the format and the kv_cache that you want",
        )
    structure = read_structure(source)
    linears = dict(_linears(structure))
    found: dict[str, _Found] = {}
    for done, module in enumerate(source.quantized_modules):
        progress("read codes", done, len(source.quantized_modules))
        if module not in linears:
            raise ContractError(
                f"{module} is quantized, which is no linear layer of a decoder block",
                "llmopt converts models whose head and embeddings are in 16 bit",
            )
        found[module] = _look_at(source.read_quantized(module))
    progress("read codes", len(found), len(found))
    schemes = _output_schemes(found)
    _refuse_inexact(form, found, schemes)
    assigned = {name: schemes.get(module) for module, name in linears.items()}
    # Of the model and of its scales: a conversion leaves them as they are.
    dtypes = {source.info(structure.embed_disk_name).dtype}
    dtypes |= {layer.scale_dtype for layer in found.values()}

    def check(name: str, dtype: torch.dtype) -> Consumer:
        return check_consumer(
            name, source.config, structure, form, assigned, lambda _: dtype, tensor_parallel_size
        )

    def check_all(name: str) -> Consumer:
        checked = (check(name, dtype) for dtype in sorted(dtypes, key=str))
        return max(checked, key=lambda consumer: len(consumer.refusals))

    held = _hold_to_consumers(form, consumers, check_all)
    codes: dict[str, str] = {}
    for done, (module, scheme) in enumerate(schemes.items()):
        progress("hash codes", done, len(schemes))
        codes[module] = in_scheme(source.read_quantized(module), scheme).digest()
    progress("hash codes", len(codes), len(codes))
    packed = {f"{module}.weight" for module in schemes}
    rest = [name for name in source.names if name not in packed]
    copied: dict[str, str] = {}
    for done, name in enumerate(rest):
        progress("hash the rest", done, len(rest))
        copied[name] = tensor_digest(reader.read(name))
    progress("hash the rest", len(copied), len(copied))
    return Conversion(
        reader, source, structure, form, schemes, assigned, codes, copied, held, gated
    )


def in_scheme(tensor: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """The same weight under a scheme that says less: symmetric, or without a group index.

    ``scheme`` must be true of the weight.
    """
    return replace(
        tensor,
        zero_points=None if scheme.symmetric else _zero_points(tensor),
        group_index=tensor.group_index if scheme.activation_order == "group" else None,
        scheme=scheme,
    )


def _read_verdict(directory: Path) -> Outcome | None:
    file = directory / JSON_NAME
    if not file.is_file():
        return None
    try:
        return read_json(file).verdict.outcome
    except BadInputError as error:
        # It may say that the source failed; a report without a verdict would hide that.
        raise BadInputError(
            error.what, f"{error.remedy}; or move it away: the source then counts as not judged"
        ) from error


def _zero_points(tensor: QuantizedTensor) -> torch.Tensor:
    if tensor.zero_points is not None:
        return tensor.zero_points
    return torch.full(tensor.scales.shape, tensor.scheme.midpoint, dtype=torch.uint8)


def _linears(structure: ModelStructure) -> Iterator[tuple[str, str]]:
    """Disk name and memory name of every linear layer in the blocks."""
    for block in range(structure.num_blocks):
        for linear in structure.linear_names(block):
            name = f"{structure.block_prefix(block)}.{linear}"
            yield structure.disk_module(name), name


def _look_at(tensor: QuantizedTensor) -> _Found:
    zero_points, columns = tensor.zero_points, tensor.shape[1]
    per_group = tensor.scheme.columns_per_group(columns)
    index = tensor.group_index
    return _Found(
        scheme=tensor.scheme,
        shape=tensor.shape,
        scale_dtype=tensor.scales.dtype,
        all_midpoint=zero_points is None or bool((zero_points == tensor.scheme.midpoint).all()),
        some_zero=zero_points is not None and bool((zero_points == 0).any()),
        trivial=index is None or torch.equal(index, trivial_groups(columns, per_group)),
    )


def _output_schemes(found: Mapping[str, _Found]) -> dict[str, Scheme]:
    """Each layer's scheme, in the plainest words that are true of all layers that share it."""
    plain: dict[Scheme, Scheme] = {}
    for scheme in {layer.scheme for layer in found.values()}:
        alike = [layer for layer in found.values() if layer.scheme == scheme]
        order = scheme.activation_order
        if order == "group" and all(layer.trivial for layer in alike):
            order = "none"
        symmetric = scheme.symmetric or all(layer.all_midpoint for layer in alike)
        plain[scheme] = replace(scheme, symmetric=symmetric, activation_order=order)
    return {module: plain[layer.scheme] for module, layer in found.items()}


def _refuse_inexact(
    form: Format, found: Mapping[str, _Found], schemes: Mapping[str, Scheme]
) -> None:
    faults: dict[str, None] = {}
    for module, scheme in schemes.items():
        if why := form.refusal(scheme) or form.shape_refusal(scheme, found[module].shape):
            faults[why] = None
        if form.checkpoint_format == "gptq" and found[module].some_zero:
            faults["GPTQ v1 cannot hold zero points of 0 (gptq_v2 can)"] = None
    if why := form.mixture_refusal(set(schemes.values())):
        faults[f"several schemes in one checkpoint: {why}"] = None
    if faults:
        raise ContractError(
            f"{form.name} cannot hold this model exactly: {'; '.join(faults)}",
            "choose another format, or quantize the source anew for this one",
        )


def _hold_to_consumers(
    form: Format, consumers: Sequence[str], check: Callable[[str], Consumer]
) -> tuple[Consumer, ...]:
    names = consumers or [n for n, c in load_consumers().items() if form.name in c.formats]
    held = [check(name) for name in names]
    lines = Agreement((), tuple(held)).refusals
    opens = tuple(consumer for consumer in held if not consumer.refusals)
    if not opens or (consumers and lines):
        raise _refused_by(form, lines)
    return opens


def _refuse_readers_of_others(form: Format, consumers: Sequence[str]) -> None:
    """Refuse consumers that nobody knows or that do not open the format, before all else."""
    known = load_consumers()
    if unknown := next((name for name in consumers if name not in known), None):
        raise unknown_consumer(unknown)
    lines = [
        f"{name} {known[name].version}: it does not open {form.name}: {why}"
        for name in consumers
        if (why := known[name].lacks.get(form.name))
    ]
    if lines:
        raise _refused_by(form, lines)


def _refused_by(form: Format, lines: Sequence[str]) -> ContractError:
    more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
    return ContractError(
        f"as {form.name} it would be refused by\n  " + "\n  ".join(lines[:8]) + more,
        "choose another format, or other consumers",
    )
