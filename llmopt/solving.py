"""One decoder block through the solver: statistics, codes, and what the report says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmopt.calibration.block_pass import Group, check_experts
from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.statistics import InputStatistics
from llmopt.errors import NumericalError
from llmopt.quantization.gptq import GPTQOptions, gptq
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme
from llmopt.recipe import QuantizeStage
from llmopt.report.schema import LayerRecord, SchemeRecord
from llmopt.scaling import BlockScaling, scaled_weight


@dataclass(frozen=True, slots=True)
class SolvedLinear:
    """A linear layer that was quantized.

    Attributes:
        module: its name in the checkpoint (``model.layers.3.mlp.up_proj``).
        tensor: the quantized weight.
        record: its line in the report.
    """

    module: str
    tensor: QuantizedTensor
    record: LayerRecord


def solve_block(
    forwards: BlockForwards,
    stage: QuantizeStage,
    schemes: Mapping[str, Scheme],
    min_expert_tokens: int,
    scaling: BlockScaling,
) -> list[SolvedLinear]:
    """Quantize a block by GPTQ and leave the dequantized weights in its module.

    Args:
        forwards: of the block, over the calibration batches; its module's linear layers are
            changed.
        stage: the recipe's stage.
        schemes: by memory name of the linear layers to quantize.
        min_expert_tokens: that every expert to quantize must have seen.
        scaling: what was folded into the module.

    Raises:
        BadInputError: experts that too few tokens are routed to.
        NumericalError: NaN or infinity in an input or a Hessian; the layer and sample are named.
    """
    walker, block, module = forwards.walker, forwards.block, forwards.module
    structure = walker.structure
    prefix = structure.block_prefix(block)
    waves = [
        [group for group in wave if any(f"{prefix}.{linear}" in schemes for linear in group)]
        for wave in structure.waves(block)
    ]
    solved = []
    for wanted in waves if stage.true_sequential else [sum(waves, [])]:
        if not wanted:
            continue
        statistics = forwards.collect_wave(wanted)
        check_experts(structure, block, statistics, min_expert_tokens)
        for linear, shared in _linears(wanted, statistics):
            name = f"{prefix}.{linear}"
            if name not in schemes:
                continue
            layer = module.get_submodule(linear)
            assert isinstance(layer, nn.Linear)
            scale_dtype = walker.source.info(structure.disk_name(f"{name}.weight")).dtype
            scaled = scaled_weight(walker, name, linear, scaling.linears)
            solved.append(
                _solve(
                    layer.weight.data if scaled is None else scaled,
                    shared,
                    stage,
                    schemes[name],
                    scale_dtype,
                    structure.disk_module(name),
                    block,
                )
            )
            layer.weight.data.copy_(solved[-1].tensor.dequantize(layer.weight.dtype))
    return solved


def _linears(
    groups: Sequence[Group], statistics: Mapping[Group, InputStatistics]
) -> Iterator[tuple[str, InputStatistics]]:
    for group in groups:
        for linear in group:
            yield linear, statistics[group]


def _solve(
    weight: Tensor,
    statistics: InputStatistics,
    stage: QuantizeStage,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    module: str,
    block: int,
) -> SolvedLinear:
    options = GPTQOptions(
        damping=stage.damping,
        static_groups=stage.static_groups,
        clip=stage.clip,
        refine_scales=stage.refine_scales,
    )
    try:
        result = gptq(weight, statistics.hessian, scheme, options, scale_dtype)
    except NumericalError as error:
        raise NumericalError(f"{module}: {error.what}", error.remedy) from error
    if not math.isfinite(result.error):
        raise NumericalError(
            f"{module}: its output error overflows float32; its largest weight is "
            f"{float(weight.abs().max()):.3g}, its largest input {statistics.max_abs:.3g}",
            "check the source model; leave this layer out with `ignore`",
        )
    record = LayerRecord(
        name=module,
        block=block,
        shape=result.tensor.shape,
        scheme=scheme_record(scheme),
        solver="gptq",
        weight_error=relative_weight_error(weight.float(), result.tensor),
        output_error=result.error,
        plain_output_error=result.rtn_error,
        damping=result.damping,
        num_damping_escalations=result.num_factorizations - 1,
        num_dead_columns=result.num_dead_columns,
        num_tokens=statistics.num_tokens,
        input_max_abs=statistics.max_abs,
    )
    return SolvedLinear(module, result.tensor, record)


def relative_weight_error(weight: Tensor, tensor: QuantizedTensor) -> float:
    """``|W - Q|^2 / |W|^2``, 0 for an all-zero weight."""
    total = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    error = torch.linalg.vector_norm(weight - tensor.dequantize(), dtype=torch.float64)
    difference = float(error) ** 2
    return difference / total if total else 0.0


def scheme_record(scheme: Scheme) -> SchemeRecord:
    """A scheme as the report has it."""
    return SchemeRecord(
        name=scheme.name,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        activation_order=scheme.activation_order,
    )
