"""AWQ's scale search (Lin et al., arXiv 2306.00978), from second moments alone.

Input channels that matter are multiplied before rounding and divided again by what produces them.
With ``H = sum x x^T`` the output error of a candidate is ``tr((W - Q(W s)/s) H (W - Q(W s)/s)^T)``,
so no module is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme

DuoScaling = bool | Literal["both"]

_SAMPLE_ROWS = 512  # rows of all readers together that the error is measured on
_SMALLEST_MAGNITUDE = 1e-4  # of the largest: a channel hardly used gets no extreme scale


@dataclass(frozen=True, slots=True)
class AWQOptions:
    """What to try.

    Attributes:
        num_scales: exponents ``alpha`` from 1/num_scales to 1, beside 0, which changes nothing.
        duo_scaling: whether the scales are ``x^alpha / w^(1 - alpha)`` of the channel's activation
            and weight magnitude (as in AutoAWQ), ``x^alpha`` alone, or whichever is better.
    """

    num_scales: int = 20
    duo_scaling: DuoScaling = "both"


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear layer that reads the scaled channels.

    Attributes:
        weight: ``(out, in)``, unscaled.
        hessian: ``(in, in) float32``, the mean of ``x x^T`` over its tokens, up to a factor that
            all readers of a search share.
        num_tokens: how many tokens that was the mean of.
        scheme: what it will be quantized to.
        scale_dtype: element type of its group scales.
    """

    weight: Tensor
    hessian: Tensor
    num_tokens: int
    scheme: Scheme
    scale_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """The scales with the least error.

    Attributes:
        scales: ``(channels,) float32``: what the readers' columns are multiplied by.
        alpha: the exponent they come from; 0 where nothing beat leaving the channels as they are.
        duo: whether the weight's magnitude was divided by.
        error_ratio: output error under plain rounding, over that without scales; at most 1.
    """

    scales: Tensor
    alpha: float
    duo: bool
    error_ratio: float


def search_scales(
    readers: Sequence[Reader],
    channels: Tensor,
    realise: Callable[[Tensor], Tensor],
    options: AWQOptions,
) -> ScaleSearch:
    """Find the scales that lower the readers' output error most.

    Args:
        readers: at least one.
        channels: ``(in,) int64``, the channel that each input column belongs to. Query heads that
            share a value head share its channels.
        realise: scales as they can be folded exactly, given those wished for.
        options: what to try.

    Raises:
        NumericalError: as :func:`llmopt.quantization.rtn.rtn`.
    """
    sampled = _sample(readers)
    num_channels = int(channels.max()) + 1
    activation = _by_channel(_activation_magnitude(readers), channels, num_channels)
    weight = _by_channel(_weight_magnitude(readers), channels, num_channels)
    unscaled = torch.ones_like(activation)
    without = _error(sampled, unscaled[channels])
    best = ScaleSearch(unscaled, 0.0, False, 1.0)
    if without == 0.0:
        return best
    for alpha, duo, wished in _candidates(activation, weight, options):
        scales = realise(wished)
        ratio = _error(sampled, scales[channels]) / without
        if ratio < best.error_ratio:
            best = ScaleSearch(scales, alpha, duo, ratio)
    return best


def _candidates(
    activation: Tensor, weight: Tensor, options: AWQOptions
) -> Iterator[tuple[float, bool, Tensor]]:
    variants = [False, True] if options.duo_scaling == "both" else [options.duo_scaling]
    for duo in variants:
        for step in range(1, options.num_scales + 1):
            alpha = step / options.num_scales
            scales = activation.pow(alpha)
            if duo:
                scales = scales / weight.pow(1 - alpha)
            # Centred on one, so that neither side's element type is driven to its limits.
            yield alpha, duo, scales / scales.log().mean().exp()


def _activation_magnitude(readers: Sequence[Reader]) -> Tensor:
    """Root mean square of each input column, ``(in,)``, over the tokens of all readers."""
    total = sum(reader.num_tokens for reader in readers)
    square = torch.zeros_like(readers[0].hessian.diagonal())
    for reader in readers:
        square += reader.hessian.diagonal() * (reader.num_tokens / max(total, 1))
    return square.sqrt()


def _weight_magnitude(readers: Sequence[Reader]) -> Tensor:
    """Mean of ``|w|`` over its group's largest, over all rows of all readers, ``(in,)``."""
    total = torch.zeros_like(readers[0].hessian.diagonal())
    for reader in readers:
        rows, columns = reader.weight.shape
        groups = reader.weight.float().abs()
        groups = groups.reshape(rows, -1, reader.scheme.columns_per_group(columns))
        largest = groups.amax(dim=-1, keepdim=True)
        total += (groups / torch.where(largest == 0, 1.0, largest)).view(rows, columns).sum(dim=0)
    return total / sum(len(reader.weight) for reader in readers)


def _by_channel(magnitude: Tensor, channels: Tensor, num_channels: int) -> Tensor:
    """Root mean square over the columns of each channel, ``(channels,)``, largest 1."""
    zeros = magnitude.new_zeros(num_channels)
    counts = zeros.index_add(0, channels, torch.ones_like(magnitude))
    mean = (zeros.index_add(0, channels, magnitude.square()) / counts.clamp(min=1)).sqrt()
    largest = mean.max()
    if not bool(largest > 0):
        return torch.ones_like(mean)
    return (mean / largest).clamp(min=_SMALLEST_MAGNITUDE)


def _sample(readers: Sequence[Reader]) -> list[Reader]:
    """The same readers with evenly spaced rows, at most 512 together where that leaves each one."""
    every = -(-sum(len(reader.weight) for reader in readers) // _SAMPLE_ROWS)
    return [replace(reader, weight=reader.weight[::every].float()) for reader in readers]


def _error(readers: Sequence[Reader], columns: Tensor) -> float:
    """Output error of plain rounding with the columns scaled, summed over readers and tokens."""
    total = 0.0
    for reader in readers:
        scaled = reader.weight * columns
        # Groups by activation order are not known yet; where they lie is near enough for this.
        scheme = replace(reader.scheme, activation_order="none")
        rounded = rtn(scaled, scheme, scale_dtype=reader.scale_dtype).dequantize()
        rest = (scaled - rounded) / columns
        error = ((rest @ reader.hessian) * rest).sum(dtype=torch.float64)
        total += float(error) * reader.num_tokens
    return total
