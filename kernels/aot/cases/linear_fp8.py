"""linear_fp8, by what shares a scale, by the type of x and by the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aot.case import Case, meta
from llmopt_kernels.linear_fp8 import (
    FP8,
    Fp8Config,
    Fp8Weight,
    candidate_configs,
    launch_linear_fp8,
    shipped_config,
)

IN, OUT = 4096, 4096
W_SCALES = {"tensor": (1,), "channel": (OUT, 1), "block": (OUT // 128, IN // 128)}
# x's type and what shares its scale; None: found by the kernel.
INPUTS = {
    "tensor": [(FP8, "tensor"), (torch.bfloat16, "tensor")],
    "channel": [(FP8, "token"), (torch.bfloat16, None)],
    "block": [(FP8, "group"), (torch.bfloat16, None), (torch.float16, None)],
}


def cases() -> Iterator[Case]:
    """Decoding (16, 32 and 64 tokens) and prefill (4096) of a 4096 x 4096 weight."""
    for granularity, inputs in INPUTS.items():
        for dtype, shared in inputs:
            for tokens in (16, 32, 64, 4096):
                configs = candidate_configs(tokens, OUT, IN, grouped=granularity == "block")
                for index, config in enumerate(configs):
                    yield _case(tokens, dtype, shared, granularity, config, index == 0)
    for index, config in enumerate(candidate_configs(4096, OUT, IN, fast=True)):
        yield _case(4096, FP8, "token", "channel", config, index == 0, fast=True)
    # Columns that no step divides, and of which rows begin at odd addresses.
    for columns in (4000, 4001):
        config = shipped_config(4096, OUT, columns, aligned=columns % 16 == 0)
        for shared, granularity in (("token", "channel"), ("group", "block")):
            yield _case(4096, FP8, shared, granularity, config, True, columns=columns)


def _case(
    tokens: int,
    dtype: torch.dtype,
    shared: str | None,
    granularity: str,
    config: Fp8Config,
    shipped: bool,
    *,
    fast: bool = False,
    columns: int = IN,
) -> Case:
    x, x_scale = meta(tokens, columns, dtype=dtype), _x_scale(shared, tokens)
    weight = Fp8Weight(
        meta(OUT, columns, dtype=FP8), meta(*W_SCALES[granularity], dtype=torch.float32)
    )
    bias = meta(OUT)
    kind = {FP8: "fp8", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    problem = f"{granularity} {kind} {tokens}x{columns}{' fast' if fast else ''}"
    return Case(
        f"linear_fp8 {problem} {_text(config)}",
        lambda: launch_linear_fp8(
            x, weight, bias, x_scale=x_scale, fast_accumulation=fast, config=config
        ),
        tensor_cores=True,
        shipped=shipped,
        archs=(90,),
    )


def _text(config: Fp8Config) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    options = [
        word
        for word, there in (
            ("swap", config.swap),
            ("loop", config.quantize_in_loop),
            ("tma", config.tma),
            (f"split{config.splits}", config.splits > 1),
        )
        if there
    ]
    return " ".join([tile, f"{config.num_warps}w{config.num_stages}s", *options])


def _x_scale(shared: str | None, tokens: int) -> Tensor | None:
    shapes = {"tensor": (1,), "token": (tokens, 1), "group": (tokens, IN // 128)}
    return None if shared is None else meta(*shapes[shared], dtype=torch.float32)
