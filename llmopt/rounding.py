"""One decoder block rounded to nearest: from its weights alone, or with its inputs in view."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from llmopt.calibration.block_pass import check_experts
from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.statistics import InputStatistics
from llmopt.checkpoint.structure import ModelStructure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import NumericalError
from llmopt.quantization.output_error import relative_output_error, sampled_rows
from llmopt.quantization.refinement import refine_scales
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme
from llmopt.recipe import QuantizeStage
from llmopt.report.schema import LayerRecord
from llmopt.scaling import BlockScaling, LinearScales
from llmopt.solving import SolvedLinear, relative_weight_error, scheme_record


def round_block(
    structure: ModelStructure,
    source: TensorSource,
    block: int,
    stage: QuantizeStage,
    schemes: Mapping[str, Scheme],
    device: str,
) -> list[SolvedLinear]:
    """Quantize a block by plain rounding, from the weights alone.

    Args:
        structure: of the checkpoint.
        source: its weights.
        block: which block.
        stage: the recipe's stage (clipping).
        schemes: by memory name of the linear layers to quantize.
        device: where to round.
    """
    solved = []
    for linear in structure.linear_names(block):
        name = f"{structure.block_prefix(block)}.{linear}"
        if name not in schemes:
            continue
        weight = source.read(structure.disk_name(f"{name}.weight")).to(device)
        scheme = schemes[name]
        tensor = rtn(weight, scheme, clip=stage.clip, scale_dtype=weight.dtype)
        module = structure.disk_module(name)
        record = LayerRecord(
            name=module,
            block=block,
            shape=tensor.shape,
            scheme=scheme_record(scheme),
            solver="rtn",
            weight_error=relative_weight_error(weight.float(), tensor),
        )
        solved.append(SolvedLinear(module, tensor, record))
    return solved


def round_seen_block(
    forwards: BlockForwards,
    stage: QuantizeStage,
    schemes: Mapping[str, Scheme],
    min_expert_tokens: int,
    scaling: BlockScaling,
) -> list[SolvedLinear]:
    """Round a scaled block, or clip by its inputs; leave the dequantized weights in its module.

    One pass over the calibration batches is enough, and the scale stage's serves where there was
    one: what scaling made of the second moments can be computed.

    Args:
        forwards: of the block, over the calibration batches; its module's linear layers are
            changed.
        stage: the recipe's stage.
        schemes: by memory name of the linear layers to quantize.
        min_expert_tokens: that every expert to quantize must have seen.
        scaling: what was folded into the module.

    Raises:
        BadInputError: experts that too few tokens are routed to.
        NumericalError: NaN or infinity in an input; the layer and sample are named.
    """
    walker, block, module = forwards.walker, forwards.block, forwards.module
    structure = walker.structure
    prefix = structure.block_prefix(block)
    groups = [
        group
        for group in structure.input_groups(block)
        if any(f"{prefix}.{linear}" in schemes for linear in group)
    ]
    if not groups:
        return []
    statistics = scaling.statistics or forwards.collect(groups)
    check_experts(structure, block, statistics, min_expert_tokens)
    shared = {linear: statistics[group] for group in groups for linear in group}
    solved = []
    for linear in structure.linear_names(block):
        name = f"{prefix}.{linear}"
        if name not in schemes:
            continue
        weight = walker.source.read(structure.disk_name(f"{name}.weight")).to(walker.device)
        solved.append(
            _round(
                weight,
                shared[linear],
                stage,
                schemes[name],
                scaling.linears.get(linear, LinearScales()),
                structure.disk_module(name),
                block,
            )
        )
        layer = module.get_submodule(linear)
        assert isinstance(layer, nn.Linear)
        layer.weight.data.copy_(solved[-1].tensor.dequantize(layer.weight.dtype))
    return solved


def _round(
    weight: Tensor,
    statistics: InputStatistics,
    stage: QuantizeStage,
    scheme: Scheme,
    scales: LinearScales,
    module: str,
    block: int,
) -> SolvedLinear:
    hessian = statistics.hessian
    scaled = scales.fold(weight)
    try:
        tensor = rtn(
            scaled,
            scheme,
            clip=stage.clip,
            scale_dtype=weight.dtype,
            hessian=scales.hessian(hessian) if stage.clip == "activation" else None,
        )
        if stage.refine_scales:
            tensor = refine_scales(tensor, scaled, scales.hessian(hessian))
    except NumericalError as error:
        raise NumericalError(f"{module}: {error.what}", error.remedy) from error
    rows = sampled_rows(weight)
    some = weight[rows].float()
    plain = rtn(some, scheme, scale_dtype=weight.dtype).dequantize()
    record = LayerRecord(
        name=module,
        block=block,
        shape=tensor.shape,
        scheme=scheme_record(scheme),
        solver="rtn",
        weight_error=relative_weight_error(scaled, tensor),
        output_error=relative_output_error(some, scales.unfold(tensor.dequantize())[rows], hessian),
        plain_output_error=relative_output_error(some, plain, hessian),
        num_dead_columns=int((hessian.diagonal() == 0).sum()),
        num_tokens=statistics.num_tokens,
        input_max_abs=statistics.max_abs,
    )
    return SolvedLinear(module, tensor, record)
