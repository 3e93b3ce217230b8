"""Weights as they come and as they should not, to quantize."""

import torch

SAMPLES = ("gaussian", "heavy-tailed", "bfloat16", "zero", "tiny", "huge", "one-hot")


def sample(name: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """``(rows, columns) float32``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    match name:
        case "gaussian":
            return weight * 0.02
        case "heavy-tailed":
            return weight / torch.rand(rows, columns, generator=generator).clamp(0.02) * 0.01
        case "bfloat16":
            return (weight * 0.02).bfloat16().float()
        case "zero":
            return torch.zeros(rows, columns)
        case "tiny":
            return weight * 1e-9
        case "huge":
            return weight * 500
        case "one-hot":
            weight = torch.zeros(rows, columns)
            columns_hit = torch.randint(0, columns, (rows,), generator=generator)
            weight[torch.arange(rows), columns_hit] = 1.5
            weight[:, columns // 3] = -0.7
            return weight
    raise AssertionError(name)


def importance(columns: int, seed: int = 1) -> torch.Tensor:
    """``(columns,) float32``, over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(columns, generator=generator) * 1.2)
