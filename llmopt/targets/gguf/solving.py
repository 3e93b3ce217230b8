"""Matrices into ggml's types: rounded from their weights alone, or with their inputs in view."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from llmopt.calibration.block_pass import Group, check_experts
from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.hidden_states import HiddenStates
from llmopt.calibration.statistics import ColumnStatistics, InputStatistics
from llmopt.calibration.walker import BlockWalker
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import NumericalError
from llmopt.formats.gguf.imatrix import ImportanceMatrix
from llmopt.quantization.ggml.feedback import FeedbackOptions, gptq_blocks
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.recipe import QuantizeStage
from llmopt.report.schema import LayerRecord, SchemeRecord
from llmopt.targets.gguf.planning import Matrix

_S = TypeVar("_S", bound=ColumnStatistics)

_HEAD_ROWS = 4096  # of hidden states through the final norm at a time


@dataclass(frozen=True, slots=True)
class SolvedMatrix:
    """A matrix that was quantized.

    Attributes:
        matrix: which one.
        tensor: in the checkpoint's order of rows.
        record: its line in the report.
        weighed: whether importance weighed its errors.
    """

    matrix: Matrix
    tensor: GGMLTensor
    record: LayerRecord
    weighed: bool


@dataclass(frozen=True, slots=True)
class Weighing:
    """Where the importance of input channels comes from.

    Attributes:
        wanted: whether there is to be any.
        given: what somebody's file says; it goes before the calibration text.
        shapes: of the file's tensors, by name, for reading ``given``.
    """

    wanted: bool
    given: ImportanceMatrix | None
    shapes: Mapping[str, tuple[int, ...]]

    def of(self, matrix: Matrix, statistics: ColumnStatistics | None) -> Tensor | None:
        """``(in,) float32``, mean squares of a matrix's input; ``None`` where nothing is known."""
        if not self.wanted:
            return None
        if self.given is not None:
            shape = self.shapes[matrix.gguf_name]
            importance = self.given.importance(matrix.gguf_name, shape)
            if importance is None or importance.ndim == 1:
                return importance
            return importance[matrix.part]
        return None if statistics is None else statistics.energy


def round_matrices(
    source: TensorSource,
    matrices: Sequence[Matrix],
    stage: QuantizeStage,
    weighing: Weighing,
    block: int | None,
    device: str | torch.device,
    statistics: Mapping[str, ColumnStatistics] | None = None,
) -> Iterator[SolvedMatrix]:
    """Quantize matrices one after the other.

    Args:
        source: their weights.
        matrices: what to quantize.
        stage: of the recipe.
        weighing: where importance comes from.
        block: the decoder block that they are of.
        device: where to round.
        statistics: of their inputs, by tensor name in the checkpoint.
    """
    for matrix in matrices:
        weight = source.read(matrix.name).to(device)
        seen = (statistics or {}).get(matrix.name)
        importance = weighing.of(matrix, seen)
        with _naming(matrix):
            tensor = quantize_blocks(
                weight, matrix.chosen.type, importance=importance, search=stage.found_by
            )
        record = LayerRecord(
            name=matrix.module,
            block=block,
            shape=tensor.shape,
            scheme=scheme_record(matrix),
            solver="rtn",
            weight_error=relative_weight_error(weight, tensor),
            num_dead_columns=0 if seen is None else int(seen.zero_columns.sum()),
            num_tokens=0 if seen is None else seen.num_tokens,
            input_max_abs=0.0 if seen is None else seen.max_abs,
        )
        yield SolvedMatrix(matrix, tensor, record, importance is not None)


def round_seen_block(
    forwards: BlockForwards,
    matrices: Sequence[Matrix],
    stage: QuantizeStage,
    weighing: Weighing,
    min_expert_tokens: int,
) -> list[SolvedMatrix]:
    """Round a block by the importance of its inputs; leave what it became in its module.

    One pass over the calibration batches gathers the mean square of every input channel.

    Raises:
        BadInputError: experts that too few tokens are routed to.
        NumericalError: NaN or infinity in an input; the layer and sample are named.
    """
    walker, block = forwards.walker, forwards.block
    groups = _groups(walker.structure.input_groups(block), matrices)
    statistics: dict[str, ColumnStatistics] = {}
    if groups:
        found = forwards.gather(groups, ColumnStatistics)
        check_experts(walker.structure, block, found, min_expert_tokens)
        statistics = _by_name(matrices, found)
    solved = list(
        round_matrices(walker.source, matrices, stage, weighing, block, walker.device, statistics)
    )
    for item in solved:
        put_back(forwards.module, item)
    return solved


def solve_block(
    forwards: BlockForwards,
    matrices: Sequence[Matrix],
    stage: QuantizeStage,
    weighing: Weighing,
    min_expert_tokens: int,
) -> list[SolvedMatrix]:
    """Quantize a block by GPTQ into the blocks' fixed grids, and leave the result in its module.

    Raises:
        BadInputError: experts that too few tokens are routed to.
        NumericalError: NaN or infinity in an input or a Hessian; the layer and sample are named.
    """
    walker, block = forwards.walker, forwards.block
    structure = walker.structure
    waves = [_groups(wave, matrices) for wave in structure.waves(block)]
    solved: list[SolvedMatrix] = []
    for wanted in waves if stage.true_sequential else [sum(waves, [])]:
        if not wanted:
            continue
        statistics = forwards.collect_wave(wanted)
        check_experts(structure, block, statistics, min_expert_tokens)
        of_wave = _by_name(matrices, statistics)
        for matrix in matrices:
            if matrix.name in of_wave:
                weight = walker.source.read(matrix.name).to(walker.device)
                seen = of_wave[matrix.name]
                solved.append(_solve(matrix, weight, seen, stage, weighing, block))
                put_back(forwards.module, solved[-1])
    return solved


def _solve(
    matrix: Matrix,
    weight: Tensor,
    statistics: InputStatistics,
    stage: QuantizeStage,
    weighing: Weighing,
    block: int,
) -> SolvedMatrix:
    importance = weighing.of(matrix, statistics)
    # Without a word GPTQ's search for scales goes by the Hessian's diagonal.
    alike = torch.ones(weight.shape[1], device=weight.device)
    options = FeedbackOptions(damping=stage.damping, search=stage.found_by)
    with _naming(matrix):
        result = gptq_blocks(
            weight,
            statistics.hessian,
            matrix.chosen.type,
            options,
            alike if importance is None else importance,
        )
    if not math.isfinite(result.error):
        raise NumericalError(
            f"{matrix.module}: its output error overflows float32; its largest weight is "
            f"{float(weight.abs().max()):.3g}, its largest input {statistics.max_abs:.3g}",
            "check the source model; leave this layer out with `ignore`",
        )
    record = LayerRecord(
        name=matrix.module,
        block=block,
        shape=result.tensor.shape,
        scheme=scheme_record(matrix),
        solver="gptq",
        weight_error=relative_weight_error(weight, result.tensor),
        output_error=result.error,
        plain_output_error=result.rtn_error,
        damping=result.damping,
        num_damping_escalations=result.num_factorizations - 1,
        num_dead_columns=result.num_dead_columns,
        num_tokens=statistics.num_tokens,
        input_max_abs=statistics.max_abs,
    )
    return SolvedMatrix(matrix, result.tensor, record, importance is not None)


def head_statistics(walker: BlockWalker, hidden: HiddenStates) -> ColumnStatistics:
    """Of what enters the head.

    Args:
        walker: started with the calibration batches.
        hidden: outputs of the last block.

    Raises:
        NumericalError: NaN or infinity behind the final norm; the sample is named.
    """
    structure, head = walker.structure, walker.head()
    statistics = ColumnStatistics(structure.anatomy.head, structure.hidden_size, walker.device)
    for index, batch in enumerate(walker.batches):
        states = hidden.read(index)
        rows = states.reshape(-1, states.shape[-1])
        normed = torch.cat([head.inputs(part) for part in torch.split(rows, _HEAD_ROWS)])
        statistics.update(normed.view(*batch.shape, -1), batch, index)
    return statistics


@contextmanager
def _naming(matrix: Matrix) -> Iterator[None]:
    """Put a matrix's name before what goes wrong with it."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{matrix.module}: {error.what}", error.remedy) from error


def _groups(groups: Sequence[Group], matrices: Sequence[Matrix]) -> list[Group]:
    """The input groups with a matrix among ``matrices``."""
    wanted = {matrix.linear for matrix in matrices}
    return [group for group in groups if wanted.intersection(group)]


def _by_name(matrices: Sequence[Matrix], statistics: Mapping[Group, _S]) -> dict[str, _S]:
    shared = {linear: found for group, found in statistics.items() for linear in group}
    return {matrix.name: shared[matrix.linear] for matrix in matrices if matrix.linear in shared}


def put_back(module: nn.Module, solved: SolvedMatrix) -> None:
    """Let a block compute with what a matrix became."""
    assert solved.matrix.linear is not None
    layer = module.get_submodule(solved.matrix.linear)
    assert isinstance(layer, nn.Linear)
    layer.weight.data.copy_(solved.tensor.dequantize(layer.weight.dtype))


def relative_weight_error(weight: Tensor, tensor: GGMLTensor) -> float:
    """``|W - Q|^2 / |W|^2``, 0 for an all-zero weight; some rows at a time."""
    total = difference = 0.0
    step = max(1, (1 << 22) // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        values = weight[rows].float()
        total += float(values.square().sum(dtype=torch.float64))
        rest = values - tensor.take_rows(rows).dequantize()
        difference += float(rest.square().sum(dtype=torch.float64))
    return difference / total if total else 0.0


def scheme_record(matrix: Matrix) -> SchemeRecord:
    """A type as the report has it."""
    kind = matrix.chosen.type
    return SchemeRecord(
        name=kind.name,
        bits=kind.bits,
        group_size=kind.sub_block,
        symmetric=kind.min_sign == 0,
        is_ggml=True,
    )
