"""How attention_decode is cut up: what is shipped, and what is worth timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from llmopt_kernels.paged_kv import Kind


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Tile sizes and launch parameters of the kernel over one store.

    Attributes:
        block_n: tokens a step.
        num_warps: of 32 threads.
        num_stages: steps whose loads are under way at once.
    """

    block_n: int
    num_warps: int
    num_stages: int


# Block of tokens, warps, stages: what keeps about 64 KiB of loads under way on a multiprocessor and
# every kernel free of spills.
_SHIPPED: dict[Kind, dict[int, tuple[int, int, int]]] = {
    "16-bit": {64: (128, 4, 3), 192: (32, 4, 3), 256: (32, 4, 3)},
    "fp8": {64: (128, 4, 3), 128: (128, 4, 3)},
    "int8": {64: (128, 4, 3), 128: (128, 4, 3), 192: (64, 8, 3), 256: (64, 8, 3)},
    "int4": {80: (32, 4, 3), 128: (32, 4, 3), 192: (32, 4, 3), 256: (32, 4, 3)},
}


def shipped_config(
    kind: Kind, head_dim: int, page_size: int, block_m: int, chip: int | str
) -> DecodeConfig:
    """The configuration for a kind of cache, by shape and by the chip's ``architecture``."""
    if isinstance(chip, str):  # 64 KiB of shared memory, 256 registers a thread
        block_n, num_warps, num_stages = 32, 4, 2
    elif block_m == 16:
        block_n, num_warps, num_stages = _SHIPPED[kind].get(head_dim, (64, 4, 3))
    elif kind == "16-bit" and head_dim <= 128:
        block_n, num_warps, num_stages = 64, 8, 3
    elif kind == "16-bit" and head_dim == 192:
        block_n, num_warps, num_stages = 32, 8, 3
    else:
        block_n, num_warps, num_stages = 32, 4, 3
    if kind == "int4":  # within a page: its keys have one row of scales
        block_n = min(block_n, page_size)
    return DecodeConfig(block_n, num_warps, num_stages)


# Of 128 channels; what spills a register or two on compute capability 9.0 (triton 3.9), with a
# window or without.
_SPILLED: dict[Kind, set[tuple[int, int, int]]] = {
    "16-bit": {(64, 4, 2), (128, 8, 2), (128, 8, 3)},
    "fp8": {(128, 8, 4)},
}


def candidate_configs(
    kind: Kind, head_dim: int, page_size: int, block_m: int
) -> Iterator[DecodeConfig]:
    """What the benchmark tries."""
    for block_n, num_warps, num_stages in product((32, 64, 128), (4, 8), (2, 3, 4)):
        if block_n * _row_bytes(kind, head_dim) * (num_stages - 1) > 128 * 1024:
            continue
        if kind == "int4" and block_n > page_size:
            continue
        if block_m > 16 and (block_n, num_warps) == (128, 4):  # more than its registers hold
            continue
        if head_dim == 128 and (block_n, num_warps, num_stages) in _SPILLED.get(kind, ()):
            continue
        yield DecodeConfig(block_n, num_warps, num_stages)


def _row_bytes(kind: Kind, head_dim: int) -> int:
    """Of a token's key and value."""
    bits = {"16-bit": 16, "fp8": 8, "int8": 8, "int4": 4}
    return 2 * head_dim * bits[kind] // 8
