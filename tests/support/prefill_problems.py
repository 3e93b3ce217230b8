"""Problems of attention_prefill, packed and paged, and how a result is held to its reference."""

import math
from dataclasses import replace

import torch
from support.comparing import TOLERANCE, poisoned, relative_error

from llmopt_kernels.attention_prefill import (
    PrefillConfig,
    attention_prefill_reference,
    launch_attention_prefill,
)
from llmopt_kernels.decode_problem import CachedTokens
from llmopt_kernels.paged_kv import PagedKV, from_interleaved, new_cache, pack_nibbles
from llmopt_kernels.prefill_problem import PackedTokens, PrefillProblem

SMALL = PrefillConfig(16, 16, 4, 2)
WIDE = PrefillConfig(32, 16, 4, 2)
TALL = PrefillConfig(16, 32, 4, 2)
# Queries and keys of a sequence: whole and partial tiles, one token, none, a chunk of a prompt
# (fewer queries than keys), and queries before the first key.
LENGTHS = [(17, 17), (0, 0), (1, 1), (20, 53), (18, 5), (3, 0), (0, 5)]


def bounds(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def rows(generator, count, heads, head_dim, dtype, device):
    """Heads cut out of wider rows, whose rest must not be read."""
    wide = poisoned(count, heads + 1, head_dim, dtype=dtype, device="cpu")
    wide[:, :-1] = torch.randn(count, heads, head_dim, generator=generator).to(dtype)
    return wide.to(device)[:, :-1]


def packed(
    device, lengths=LENGTHS, heads=(2, 1), head_dim=64, dtype=torch.bfloat16, seed=0, **options
):
    generator = torch.Generator().manual_seed(seed)
    num_q, num_kv = sum(n for n, _ in lengths), sum(n for _, n in lengths)
    q = rows(generator, num_q, heads[0], head_dim, dtype, device)
    k = rows(generator, num_kv, heads[1], head_dim, dtype, device)
    v = rows(generator, num_kv, heads[1], head_dim, dtype, device)
    kv = PackedTokens(k, v, bounds([n for _, n in lengths], device))
    longest = max(n for n, _ in lengths)
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads[0], generator=generator).to(device)
    return PrefillProblem(q, kv, bounds([n for n, _ in lengths], device), longest, **options)


def codes(generator, shape, head_dim, kind, dtype):
    """Elements of a pool; of int8 and fp8 the largest codes too."""
    if kind == "16-bit":
        return torch.randn(*shape, head_dim, generator=generator).to(dtype)
    if kind == "fp8":
        values = torch.randn(*shape, head_dim, generator=generator)
        values[..., 0] = 448.0
        return values.to(torch.float8_e4m3fn)
    if kind == "int8":
        return torch.randint(-128, 128, (*shape, head_dim), generator=generator).to(torch.int8)
    return pack_nibbles(torch.randint(0, 16, (*shape, head_dim), generator=generator))


def paged(
    device,
    kind="16-bit",
    page_size=16,
    lengths=LENGTHS,
    heads=(2, 1),
    head_dim=64,
    dtype=torch.bfloat16,
    interleaved=False,
    **options,
):
    """Pages in a random order; tokens and pages that no sequence has are NaN or huge."""
    problem = packed(device, lengths, heads, head_dim, dtype, **options)
    generator = torch.Generator().manual_seed(1)
    pages = [-(-n // page_size) for _, n in lengths]
    pool = 3 * sum(pages) + 1
    cache = new_cache(kind, pool, page_size, heads[1], head_dim, dtype=dtype)
    if interleaved:
        cache = from_interleaved(torch.zeros(pool, heads[1], page_size, 2 * head_dim, dtype=dtype))
    order = torch.randperm(pool - 1, generator=generator)[: sum(pages)] + 1
    table = torch.full((len(lengths), max(pages) + 1), 2**30, dtype=torch.int32)
    used = torch.zeros(pool, page_size, dtype=torch.bool)
    for index, ((_, n), own) in enumerate(zip(lengths, order.split(pages), strict=True)):
        table[index, : len(own)] = own
        token = torch.arange(n)
        used[own[token // page_size], token % page_size] = True
    for name, part in cache.tensors().items():
        if part is None:
            continue
        if name in ("k", "v"):
            part.copy_(codes(generator, part.shape[:3], head_dim, kind, dtype))
            if kind in ("16-bit", "fp8"):
                part.view(torch.uint8 if kind == "fp8" else dtype)[~used] = (
                    127 if kind == "fp8" else math.nan
                )
        else:
            spread = {"fp8": 0.5, "int8": 0.01, "int4": 0.2}[kind]
            part.copy_(torch.rand(part.shape, generator=generator) * spread + spread / 10)
            if part.shape[:2] == used.shape:
                part[~used] = math.nan
            elif kind == "int4":
                part[~used.any(1)] = math.nan
    parts = {name: None if x is None else move(x, device) for name, x in cache.tensors().items()}
    lengths_kv = torch.tensor([n for _, n in lengths], dtype=torch.int32, device=device)
    kv = CachedTokens(PagedKV(**parts), table.to(device), lengths_kv)
    return replace(problem, kv=kv)


def move(x, device):
    """To a device with the strides it has."""
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x) if device != "cpu" else x


def launched(*arguments):
    """The launcher's outputs, NaN where they were not written."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        return launch_attention_prefill(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def check(problem, config=SMALL):
    expected, expected_lse = attention_prefill_reference(problem)
    out, lse = launched(problem, True, config)
    assert out.dtype == problem.q.dtype and lse.dtype == torch.float32
    assert relative_error(out, expected) <= TOLERANCE[problem.q.dtype]
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~finite.to(lse.device))
    # Keys of int4 are rounded to 16 bit once they are dequantized; others are exact.
    tolerance = TOLERANCE[problem.q.dtype] / 10 if problem.kind == "int4" else 1e-5
    assert relative_error(lse[finite], expected_lse[finite]) <= tolerance
