"""Random packed weights."""

from __future__ import annotations

import torch

from llmopt_kernels.packed_weight import PackedWeight, pack_codes


def random_weight(
    out: int,
    inn: int,
    groups: int,
    *,
    bits: int = 4,
    asymmetric: bool = False,
    indexed: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[torch.Tensor, PackedWeight]:
    """Codes ``(out, in) uint8``, and the weight with bfloat16 scales that packs them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, inn), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, groups, generator=generator) * 0.02 + 0.005
    zeros = index = None
    if asymmetric:
        zeros = torch.randint(0, 1 << bits, (out, groups), generator=generator, dtype=torch.uint8)
        zeros = zeros.to(device)
    if indexed:
        index = torch.randperm(inn, generator=generator).int() // (inn // groups)
        index = index.to(device)
    codes, scales = codes.to(device), scales.bfloat16().to(device)
    return codes, PackedWeight(pack_codes(codes, bits), bits, inn, scales, zeros, index)
