"""AWQ's scale stage over one decoder block: find what can be rescaled, search, fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llmopt.calibration.block_pass import Group, check_experts
from llmopt.calibration.folds import Fold, find_folds
from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.probing import in_float32, role_of
from llmopt.calibration.statistics import InputStatistics
from llmopt.calibration.walker import BlockWalker, TokenBatch
from llmopt.errors import NumericalError
from llmopt.quantization.awq import AWQOptions, Reader, ScaleSearch, search_scales
from llmopt.quantization.folding import StoredValues, exact_scales
from llmopt.quantization.scheme import Scheme
from llmopt.report.schema import DeclinedFold, ScaleRecord

_PROBE_TOKENS = 32
# Of what the block adds to its input, in float32: folding is exact, the order of sums is not.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class LinearScales:
    """What was folded into a linear layer that will be quantized; None where nothing was.

    Attributes:
        rows: ``(out,) float32`` that its rows were divided by.
        columns: ``(in,) float32`` that its columns were multiplied by.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def fold(self, weight: Tensor) -> Tensor:
        """The scaled weight, ``(out, in) float32``; none of it is rounded to 16 bit."""
        scaled = weight.float()
        if self.columns is not None:
            scaled = scaled * self.columns
        return scaled if self.rows is None else scaled / self.rows.unsqueeze(1)

    def unfold(self, weight: Tensor) -> Tensor:
        """The weight that stands for a scaled one in the unscaled model, ``(out, in)``."""
        plain = weight if self.rows is None else weight * self.rows.unsqueeze(1)
        return plain if self.columns is None else plain / self.columns

    def hessian(self, hessian: Tensor) -> Tensor:
        """Of the scaled layer's input, given that of the unscaled one's, ``(in, in)``."""
        if self.columns is None:
            return hessian
        return hessian / self.columns / self.columns.unsqueeze(1)


@dataclass(slots=True)
class BlockScaling:
    """What the scale stage made of a block.

    Attributes:
        linears: by path in the block, of the linear layers that will be quantized.
        tensors: by memory name, those that stay in the source's element type and were changed.
        statistics: of the unscaled block's inputs.
        records: the folds' lines in the report.
        declined: why others could not be folded.
    """

    linears: dict[str, LinearScales] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[Group, InputStatistics] = field(default_factory=dict)
    records: list[ScaleRecord] = field(default_factory=list)
    declined: list[DeclinedFold] = field(default_factory=list)


def scale_block(
    forwards: BlockForwards,
    options: AWQOptions,
    schemes: Mapping[str, Scheme],
    min_expert_tokens: int,
) -> BlockScaling:
    """Scale a block's channels; its module is changed, what it computes is not.

    Args:
        forwards: of the block, over the calibration batches.
        options: of the search.
        schemes: by memory name of the linear layers that will be quantized.
        min_expert_tokens: that every expert to quantize must have seen.

    Raises:
        BadInputError: experts that too few tokens are routed to.
        NumericalError: NaN or infinity on the way, or the scaled block computes something else.
    """
    walker, block, module = forwards.walker, forwards.block, forwards.module
    structure = walker.structure
    prefix = structure.block_prefix(block)
    few = _first_tokens(walker.batches[0])
    hidden = forwards.inputs.read(0)[:1, : few.shape[1]].float().to(walker.device)

    def run() -> Tensor:
        return walker.forward_batch(block, module, few, hidden)

    folds, declined = find_folds(module, run)
    groups = [
        group
        for group in structure.input_groups(block)
        if any(f"{prefix}.{linear}" in schemes for linear in group)
    ]
    scaling = BlockScaling(
        declined=[
            DeclinedFold(block=block, producer=each.producer, reason=each.reason)
            for each in declined
        ]
    )
    if not groups:
        return scaling
    scaling.statistics = forwards.collect(groups)
    check_experts(structure, block, scaling.statistics, min_expert_tokens)
    folder = _Folder(walker, block, module, schemes, scaling)
    with in_float32(module):  # a scaled weight that is not rounded can be held to its source
        before = run()
        for fold in folds:
            if any(f"{prefix}.{reader}" in schemes for reader in fold.readers):
                folder.scale(fold, options)
        _check_unchanged(prefix, hidden, before, run())
    return scaling


def _first_tokens(batch: TokenBatch) -> TokenBatch:
    def cut(ids: Tensor | None) -> Tensor | None:
        return None if ids is None else ids[:1, :_PROBE_TOKENS]

    mask = batch.attention_mask
    if mask is not None:
        mask = mask[:1, :, :_PROBE_TOKENS, :_PROBE_TOKENS]
    return TokenBatch(batch.token_ids[:1, :_PROBE_TOKENS], cut(batch.position_ids), mask)


def _check_unchanged(prefix: str, hidden: Tensor, before: Tensor, after: Tensor) -> None:
    added = (before.double() - hidden.double()).norm()
    # Where a block adds next to nothing, the rounding of the sum is all that can be seen.
    floor = hidden.double().norm() * torch.finfo(before.dtype).eps
    difference = (after.double() - before.double()).norm()
    allowed = _TOLERANCE * added + floor
    if not bool(difference <= allowed):
        raise NumericalError(
            f"{prefix} computes something else once its channels are scaled: its output moved by "
            f"{float(difference):.3g}, of {float(added):.3g} that it adds",
            "leave the awq stage out, and report this model as a defect of llmopt",
        )


class _Folder:
    """Searches and folds one scale after the other; later ones see what earlier ones stored."""

    def __init__(
        self,
        walker: BlockWalker,
        block: int,
        module: nn.Module,
        schemes: Mapping[str, Scheme],
        scaling: BlockScaling,
    ) -> None:
        self.walker, self.block, self.module = walker, block, module
        self.prefix = walker.structure.block_prefix(block)
        self.schemes, self.scaling = schemes, scaling
        self.shared = {
            linear: statistics
            for group, statistics in scaling.statistics.items()
            for linear in group
        }

    def scale(self, fold: Fold, options: AWQOptions) -> None:
        stored = self._stored_values(fold)
        readers = [
            self._reader(path) for path in fold.readers if f"{self.prefix}.{path}" in self.schemes
        ]
        try:
            found = search_scales(
                readers, fold.channels, lambda scales: exact_scales(scales, stored), options
            )
        except NumericalError as error:
            name = f"{self.prefix}.{fold.producer}"
            raise NumericalError(f"scaling {name}: {error.what}", error.remedy) from error
        self.scaling.records.append(self._record(fold, found))
        if bool((found.scales != 1).any()):
            self._fold(fold, found.scales)

    def _reader(self, path: str) -> Reader:
        layer = self.module.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        statistics = self.shared[path]
        name = f"{self.prefix}.{path}"
        return Reader(
            weight=layer.weight.data,
            hessian=statistics.hessian,
            num_tokens=statistics.num_tokens,
            scheme=self.schemes[name],
            scale_dtype=self._source_dtype(f"{name}.weight"),
        )

    def _record(self, fold: Fold, found: ScaleSearch) -> ScaleRecord:
        return ScaleRecord(
            block=self.block,
            producer=fold.producer,
            readers=tuple(dict.fromkeys(role_of(reader) for reader in fold.readers)),
            alpha=found.alpha,
            duo=found.duo,
            error_ratio=found.error_ratio,
            smallest=float(found.scales.min()),
            largest=float(found.scales.max()),
        )

    def _stored_values(self, fold: Fold) -> list[StoredValues]:
        """Everything the fold touches that stays in the source's element type."""
        rows = slice(fold.first_row, fold.first_row + fold.num_channels)
        producer = f"{self.prefix}.{fold.producer}"
        stored = []
        if fold.norm_offset is not None:
            weight = self._current(f"{producer}.weight").unsqueeze(1)
            stored.append(StoredValues(weight, offset=fold.norm_offset))
        elif producer not in self.schemes:
            stored.append(StoredValues(self._current(f"{producer}.weight")[rows]))
        if self._has_bias(fold.producer):
            stored.append(StoredValues(self._current(f"{producer}.bias")[rows].unsqueeze(1)))
        by_channel = torch.argsort(fold.channels, stable=True)
        for reader in fold.readers:
            name = f"{self.prefix}.{reader}"
            if name not in self.schemes:
                columns = self._current(f"{name}.weight").t()[by_channel]
                values = columns.reshape(fold.num_channels, -1)
                stored.append(StoredValues(values, divided=False))
        return stored

    def _fold(self, fold: Fold, scales: Tensor) -> None:
        rows = slice(fold.first_row, fold.first_row + fold.num_channels)
        producer = f"{self.prefix}.{fold.producer}"
        if fold.norm_offset is not None:
            weight = self._current(f"{producer}.weight").unsqueeze(1)
            scaled = StoredValues(weight, offset=fold.norm_offset).scaled(scales).squeeze(1)
            self._store(fold.producer, "weight", scaled)
        else:
            every_row = scales.new_ones(len(self._current(f"{producer}.weight")))
            every_row[rows] = scales
            self._scale_linear(fold.producer, LinearScales(rows=every_row))
        if self._has_bias(fold.producer):
            bias = self._current(f"{producer}.bias").clone()
            bias[rows] = StoredValues(bias[rows].unsqueeze(1)).scaled(scales).squeeze(1)
            self._store(fold.producer, "bias", bias)
        for reader in fold.readers:
            self._scale_linear(reader, LinearScales(columns=scales[fold.channels]))

    def _scale_linear(self, path: str, scales: LinearScales) -> None:
        name = f"{self.prefix}.{path}"
        if name not in self.schemes:
            weight = self._current(f"{name}.weight")
            self._store(path, "weight", scales.fold(weight).to(weight.dtype))
            return
        known = self.scaling.linears.get(path, LinearScales())
        rows, columns = scales.rows, scales.columns
        merged = replace(
            known,
            rows=known.rows if rows is None else rows,
            columns=known.columns if columns is None else columns,
        )
        self.scaling.linears[path] = merged
        weight = self.module.get_parameter(f"{path}.weight")
        weight.data.copy_(merged.fold(self._source(f"{name}.weight")))

    def _store(self, path: str, key: str, value: Tensor) -> None:
        self.scaling.tensors[f"{self.prefix}.{path}.{key}"] = value
        self.module.get_parameter(f"{path}.{key}").data.copy_(value)

    def _has_bias(self, path: str) -> bool:
        return isinstance(getattr(self.module.get_submodule(path), "bias", None), nn.Parameter)

    def _current(self, name: str) -> Tensor:
        """A tensor as it will be stored, with what was folded into it so far; on the device."""
        found = self.scaling.tensors.get(name)
        return self._source(name) if found is None else found

    def _source(self, name: str) -> Tensor:
        disk_name = self.walker.structure.disk_name(name)
        return self.walker.source.read(disk_name).to(self.walker.device)

    def _source_dtype(self, name: str) -> torch.dtype:
        return self.walker.source.info(self.walker.structure.disk_name(name)).dtype


def scaled_weight(
    walker: BlockWalker, name: str, path: str, linears: Mapping[str, LinearScales]
) -> Tensor | None:
    """A scaled layer's weight in float32, from the source's; None where nothing was folded in."""
    scales = linears.get(path)
    if scales is None:
        return None
    weight = walker.source.read(walker.structure.disk_name(f"{name}.weight"))
    return scales.fold(weight.to(walker.device))
