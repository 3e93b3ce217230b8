"""What a calibrated quantization cannot do without: operations, and memory.

Counted from the model's shapes: one forward of every decoder block over the calibration tokens, and
one Hessian of every distinct input of its linear layers. A multiplication and an addition are two
operations; a symmetric rank-k update needs half of them, and so does causal attention.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from llmopt.checkpoint.structure import ModelStructure

_SIZE = 2048
_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of a calibration.

    Attributes:
        forward: of one forward of all blocks.
        hessians: of ``X'X`` for every distinct input, by symmetric updates.
    """

    forward: int
    hessians: int


@dataclass(frozen=True, slots=True)
class MatrixRate:
    """Operations a second of square products of 2048, median; measured in the same run.

    Attributes:
        float32: in float32.
        bfloat16: in bfloat16.
        threads: of torch while it was measured.
    """

    float32: float
    bfloat16: float
    threads: int


@dataclass(frozen=True, slots=True)
class Floor:
    """The least seconds of a calibration on this machine.

    Attributes:
        work: what is to be done.
        rate: what the machine gives.
    """

    work: Work
    rate: MatrixRate

    @property
    def float32_s(self) -> float:
        """Everything in float32."""
        return (self.work.forward + self.work.hessians) / self.rate.float32

    @property
    def bfloat16_s(self) -> float:
        """Everything in bfloat16."""
        return (self.work.forward + self.work.hessians) / self.rate.bfloat16

    @property
    def mixed_s(self) -> float:
        """Forward in bfloat16, Hessians in float32."""
        return self.work.forward / self.rate.bfloat16 + self.work.hessians / self.rate.float32


def count_work(structure: ModelStructure, num_samples: int, length: int) -> Work:
    """The operations of a calibration on ``num_samples`` blocks of ``length`` tokens.

    Mixtures of experts are counted as if every token went through every linear layer seen.
    """
    tokens = num_samples * length
    forward = hessians = 0
    for block in range(structure.num_blocks):
        prefix = structure.block_prefix(block)
        for group in structure.input_groups(block):
            shapes = [
                structure.skeleton.get_parameter(f"{prefix}.{linear}.weight").shape
                for linear in group
            ]
            forward += sum(2 * rows * columns * tokens for rows, columns in shapes)
            hessians += shapes[0][1] ** 2 * tokens
        # Scores and their product with the values: 2 * 2 * length^2 * width, half of it masked.
        forward += 2 * length * length * _attention_width(structure) * num_samples
    return Work(forward, hessians)


def memory_bound_bytes(structure: ModelStructure, num_tokens: int) -> int:
    """Largest block in float32, its Hessians in float32, and hidden states in 16 bit, in and out.

    Args:
        structure: of the model.
        num_tokens: calibration tokens in all.
    """
    largest = 0
    for block in range(structure.num_blocks):
        prefix = structure.block_prefix(block)
        weights = sum(p.numel() for p in structure.block(block).parameters())
        inputs = [
            structure.skeleton.get_parameter(f"{prefix}.{group[0]}.weight").shape[1]
            for group in structure.input_groups(block)
        ]
        largest = max(largest, 4 * (weights + sum(width**2 for width in inputs)))
    return largest + 2 * 2 * num_tokens * structure.hidden_size


def measure_matrix_rate(threads: int, size: int = _SIZE) -> MatrixRate:
    """Time products of two matrices of ``size x size`` in both element types."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return MatrixRate(_rate(torch.float32, size), _rate(torch.bfloat16, size), threads)
    finally:
        torch.set_num_threads(before)


def _rate(dtype: torch.dtype, size: int) -> float:
    left, right = torch.ones(2, size, size, dtype=dtype)
    out = left @ right  # the first one pays for the pages and the kernel's packing
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return float(2 * size**3 / statistics.median(seconds))


def _attention_width(structure: ModelStructure) -> int:
    """Columns of all query heads together."""
    config = structure.text_config
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or structure.hidden_size // heads
    return heads * int(width)
