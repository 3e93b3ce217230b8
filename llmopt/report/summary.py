"""What the card, the page and the console say alike of the layers: aggregates and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmopt.report.schema import LayerRecord, Report


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """The quantized layers together.

    Attributes:
        num_layers: how many there are.
        on_outputs: errors are of layer outputs on the calibration text; else of the weights.
        worst: the one with the largest error.
        worst_error: that error.
        gain: geometric mean of ours / plain rounding, ``None`` where plain rounding is ours.
        num_worse: layers where ours is worse than plain rounding.
        num_damped: layers whose damping had to be raised.
        max_input: largest magnitude that entered a layer.
    """

    num_layers: int
    on_outputs: bool
    worst: LayerRecord
    worst_error: float
    gain: float | None
    num_worse: int
    num_damped: int
    max_input: float


def summarise_layers(layers: Sequence[LayerRecord]) -> LayerSummary | None:
    """Aggregate of the layers, ``None`` when none was quantized."""
    if not layers:
        return None
    gains = [gain for gain in map(_gain, layers) if gain is not None]
    logs = [math.log(gain) for gain in gains if gain > 0]
    worst = max(measured_alike(layers), key=layer_error)
    return LayerSummary(
        num_layers=len(layers),
        on_outputs=worst.output_error is not None,
        worst=worst,
        worst_error=layer_error(worst),
        gain=math.exp(math.fsum(logs) / len(logs)) if logs else None,
        num_worse=sum(gain > 1 for gain in gains),
        num_damped=sum(layer.num_damping_escalations > 0 for layer in layers),
        max_input=max(layer.input_max_abs for layer in layers),
    )


def measured_alike(layers: Sequence[LayerRecord]) -> Sequence[LayerRecord]:
    """Those with an error of their output where any have one; errors of weights are another kind.

    Tables of a GGUF file are rounded where the layers of the blocks are solved.
    """
    return [layer for layer in layers if layer.output_error is not None] or layers


def layer_error(layer: LayerRecord) -> float:
    """The output's relative error where it was measured, else the weight's."""
    return layer.weight_error if layer.output_error is None else layer.output_error


def _gain(layer: LayerRecord) -> float | None:
    ours, plain = layer.output_error, layer.plain_output_error
    if ours is None or not plain or not math.isfinite(plain + ours):
        return None
    return ours / plain


def scheme_label(report: Report) -> str:
    """The schemes in use, most used first: ``W4A16 g128``, ``W4A16 g128 + W8A16 channel``."""
    used: dict[str, int] = {}
    for layer in report.layers:
        # Whether it is symmetric stands in the table of layers.
        label = layer.scheme.label.removesuffix(" asym")
        used[label] = used.get(label, 0) + 1
    return " + ".join(sorted(used, key=lambda label: -used[label])) or "16 bit"


def solver_label(report: Report) -> str:
    """The solvers in use, as the field writes them: ``GPTQ``, ``AWQ + RTN``."""
    solvers = sorted({layer.solver.upper() for layer in report.layers})
    return " + ".join(["AWQ"] * bool(report.scales) + solvers) or "no solver"
