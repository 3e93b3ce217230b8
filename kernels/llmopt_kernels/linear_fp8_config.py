"""How the product of ``linear_fp8`` is cut up: what is shipped, and what is worth timing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmopt_kernels.fp8_weight import num_groups
from llmopt_kernels.quantize_rows import GROUP


@dataclass(frozen=True, slots=True)
class Fp8Config:
    """How the product is cut up.

    Attributes:
        block_m: tokens of a tile.
        block_n: channels of a tile; divides 128 for a weight in blocks.
        block_k: columns a step; 128 where scales change with the columns.
        num_warps: of a program.
        num_stages: steps whose loads are under way.
        swap: multiply W by x^T, so that the tensor cores' 64 rows are channels and a tile of few
            tokens wastes none of them.
        splits: programs that share a tile's columns; their sums are added by a second kernel.
        group_m: rows of tiles that are walked together.
        quantize_in_loop: 16-bit x is quantized where it is multiplied, again for each tile of
            channels; else once, by ``quantize_rows``.
        tma: tiles are copied by Hopper's tensor memory accelerator, which takes their addresses
            off the threads; rows must begin at multiples of 16 bytes.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    splits: int = 1
    group_m: int = 8
    quantize_in_loop: bool = False
    tma: bool = False


NUM_SMS = 132
"""Multiprocessors to keep busy, those of an H100 or H200; it only decides the splits."""


def shipped_config(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    grouped: bool = False,
    fast: bool = False,
    aligned: bool = True,
) -> Fp8Config:
    """What the launcher takes without another wish.

    Args:
        num_tokens: rows of x.
        out_features: rows of W.
        in_features: columns of both.
        grouped: scales change with the columns.
        fast: sums are left in the tensor cores.
        aligned: rows begin at multiples of 16 bytes; those of other tensors are read byte by byte,
            through registers, of which larger tiles would need too many.

    Up to 64 tokens the product waits for W: small tiles, a deep pipeline, splits that give every
    multiprocessor some of W. Beyond, a program that moves its sums to other registers leaves the
    tensor cores idle meanwhile: tiles are so small that three programs share a multiprocessor.
    Without that they are as large as registers allow, for the fewest reads of shared memory.
    """
    if not aligned:
        return Fp8Config(32, 64, 128, num_warps=8, num_stages=2, swap=True)
    if num_tokens > 64:
        if fast and not grouped and num_tokens * out_features >= NUM_SMS * 128 * 256:
            return Fp8Config(128, 256, 128, num_warps=8, num_stages=4)
        return Fp8Config(64, 128, 128, num_warps=4, num_stages=3, group_m=16)
    block_m = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    num_tiles, steps = num_groups(out_features, 64), num_groups(in_features)
    return Fp8Config(
        block_m,
        64,
        128,
        num_warps=4,
        num_stages=8 if block_m < 64 else 6,
        swap=True,
        splits=max(1, min(2 * NUM_SMS // num_tiles, steps // 8, 8)),
        quantize_in_loop=num_tokens <= 32,
    )


def candidate_configs(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    grouped: bool = False,
    fast: bool = False,
) -> list[Fp8Config]:
    """What is worth timing for a problem, the shipped one first; arguments of that."""
    shipped = shipped_config(num_tokens, out_features, in_features, grouped=grouped, fast=fast)
    if num_tokens <= 64:
        others = [
            replace(shipped, splits=1),
            replace(shipped, splits=2),
            replace(shipped, splits=4),
            replace(shipped, block_n=128, num_stages=6),
            replace(shipped, num_stages=4),
            replace(shipped, swap=False),
            replace(shipped, quantize_in_loop=not shipped.quantize_in_loop),
            replace(shipped, tma=True),
        ]
        if not grouped:
            others.append(replace(shipped, block_k=256, num_stages=4))
    else:
        small = replace(shipped, block_m=64, block_n=128, num_warps=4, num_stages=3)
        large = replace(shipped, block_m=128, block_n=128, num_warps=8, num_stages=4, group_m=8)
        others = [
            small,
            replace(small, num_stages=4),
            replace(small, group_m=32),
            replace(small, block_n=64),
            replace(small, quantize_in_loop=True),
            large,
            replace(large, num_stages=3),
            replace(large, num_stages=5),
            replace(large, group_m=16),
            replace(small, tma=True),
            replace(large, tma=True),
        ]
        if fast and not grouped:
            wide = replace(large, block_n=256)
            others += [wide, replace(wide, num_stages=3), replace(wide, tma=True)]
    return list(dict.fromkeys([shipped, *others]))


def check_config(config: Fp8Config, *, grouped: bool) -> None:
    """Hold that the kernel can be cut up as ``config`` says.

    Raises:
        ValueError: tiles that do not fit the scales; says which.
    """
    if config.block_k % GROUP != 0:
        raise ValueError(f"block_k is {config.block_k}; it must be a multiple of {GROUP}")
    if grouped and (config.block_k != GROUP or GROUP % config.block_n != 0):
        raise ValueError(
            f"block_n is {config.block_n} and block_k {config.block_k}; with scales by 128 columns "
            "block_k must be 128 and block_n divide 128"
        )
