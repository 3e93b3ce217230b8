"""Paged caches filled with random tokens, NaN wherever none is."""

import dataclasses

import torch

from llmopt_kernels.decode_problem import CachedTokens
from llmopt_kernels.paged_kv import from_interleaved, new_cache


def filled_store(
    kind, lengths, page_size, kv_heads, head_dim, generator, dtype=torch.bfloat16, interleaved=False
):
    """Tokens of sequences in shuffled pages; NaN wherever no token is."""
    pages = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages) + 2
    cache = new_cache(kind, num_pages, page_size, kv_heads, head_dim, dtype=dtype)
    if interleaved:
        cache = from_interleaved(
            torch.empty(num_pages, kv_heads, page_size, 2 * head_dim, dtype=dtype)
        )
    for name, part in cache.tensors().items():
        if part is None:
            continue
        if part.dtype in (torch.int8, torch.uint8):
            low, high = (-127, 128) if part.dtype == torch.int8 else (0, 256)
            part.copy_(torch.randint(low, high, part.shape, generator=generator))
        elif "scale" in name:
            part.copy_(torch.rand(part.shape, generator=generator) + 0.5)
            part.div_({"fp8": 1, "int8": 100, "int4": 4}[kind])
        else:
            part.copy_(torch.randn(part.shape, generator=generator) - 2 * ("min" in name))
    order = torch.randperm(num_pages, generator=generator).tolist()
    table = torch.full((len(lengths), max([1, *pages])), order[-1], dtype=torch.int32)
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mine = torch.tensor([order.pop() for _ in range(pages[row])], dtype=torch.int32)
        table[row, : pages[row]] = mine
        slots = torch.arange(pages[row] * page_size)[:length]
        used[mine.long()[slots // page_size], slots % page_size] = True
    poison(cache, used)
    return CachedTokens(cache, table, torch.tensor(lengths, dtype=torch.int32))


def poison(cache, used):
    """Put NaN wherever ``used`` has no token."""
    for name, part in cache.tensors().items():
        by_head, by_page = part is None or part.dim() == 1, part is not None and part.dim() == 3
        if by_head or part.dtype in (torch.int8, torch.uint8):
            continue
        if cache.kind == "int4" and name.startswith("k_") and by_page:
            part[~used.any(1)] = float("nan")
        elif part.dtype == torch.float8_e4m3fn:
            part.view(torch.uint8)[~used] = 127
        else:
            part[~used] = float("nan")


def moved(value, device):
    """The value with every tensor in it on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if dataclasses.is_dataclass(value):
        parts = {f.name: moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value
