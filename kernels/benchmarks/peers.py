"""What torch and its libraries offer for the same problem, bound to inputs.

Each raises, with the library's own words, where it does not run; the row then says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.benchmark import Prepared, UnavailableError
from benchmarks.goals import SDPA_CUDNN, SDPA_EFFICIENT, SDPA_FLASH

SDPA_BACKENDS = {
    SDPA_FLASH: SDPBackend.FLASH_ATTENTION,
    SDPA_CUDNN: SDPBackend.CUDNN_ATTENTION,
    SDPA_EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}
SDPA_MATH = "SDPA math"


def sdpa(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Prepared:
    """``(batch, heads, tokens, head_dim)`` by one backend of torch's attention, and no other.

    A backend that knows no groups of query heads gets keys and values repeated, outside the time.

    Raises:
        RuntimeError: the backend does not take this problem; torch warns why.
    """
    backend = SDPBackend.MATH if name == SDPA_MATH else SDPA_BACKENDS[name]

    def bind(k: Tensor, v: Tensor, grouped: bool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
                )

        return call

    repeats = q.shape[1] // k.shape[1]
    if repeats == 1:
        return Prepared(bind(k, v, False))
    call = bind(k, v, True)
    try:
        call()
    except RuntimeError as error:
        if "out of memory" in str(error) or "CUDA error" in str(error):
            raise
        wide_k, wide_v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return Prepared(bind(wide_k, wide_v, False), "keys and values repeated for each query head")
    return Prepared(call)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_mod: Callable[..., Tensor] | None,
    scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None,
) -> Prepared:
    """FlexAttention ``(batch, heads, tokens, head_dim)``; compiled, but on a CPU.

    Compiling and finding the mask's blocks is not timed.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = None
    if mask_mod is not None:
        blocks = create_block_mask(
            mask_mod, None, None, q.shape[2], k.shape[2], device=q.device, _compile=False
        )
    on_cpu = q.device.type == "cpu"
    attention: Any = flex_attention if on_cpu else _compiled_flex()
    grouped = q.shape[1] != k.shape[1]
    return Prepared(
        lambda: attention(
            q, k, v, block_mask=blocks, scale=scale, score_mod=score_mod, enable_gqa=grouped
        ),
        "not compiled" if on_cpu else "",
    )


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Each problem is a compilation; past the limit it would run uncompiled, and say nothing.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def cublas(x: Tensor, weight: Tensor) -> Prepared:
    """``x (tokens, in) @ weight (out, in)^T`` in the tensors' 16-bit type."""
    return Prepared(lambda: x @ weight.t())


def tinygemm(x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None) -> Prepared:
    """Torch's int4 product, on a GPU tinygemm: ``x (tokens, in) bfloat16``.

    Args:
        x: activations.
        codes: ``(out, in) uint8``, 0 to 15.
        scales: ``(out, groups)``.
        zero_points: ``(out, groups)``; 8 everywhere without.

    Raises:
        UnavailableError: x is not bfloat16.
    """
    if x.dtype != torch.bfloat16:
        raise UnavailableError("torch's int4 product takes bfloat16 activations")
    group = codes.shape[1] // scales.shape[1]
    shift = torch.zeros_like(scales) if zero_points is None else 8.0 - zero_points.to(scales.dtype)
    # It computes (code - 8) * scale + zero.
    pairs = torch.stack([scales, shift * scales], -1).transpose(0, 1).contiguous().bfloat16()
    if x.device.type == "cpu":
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return Prepared(lambda: torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs))
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    return Prepared(lambda: torch._weight_int4pack_mm(x, packed, group, pairs))


def scaled_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    fast: bool = False,
) -> Prepared:
    """``torch._scaled_mm`` of fp8 ``x (tokens, in)`` and ``weight (out, in)``.

    Scales as of ``linear_fp8``; one a tensor, one a token and channel, or in blocks, which are
    brought into the strides that cuBLAS wants. ``fast`` leaves sums in the matrix unit's precision.
    """
    per_tensor, per_token = weight_scale.numel() == 1, x_scale.shape[-1:] == (1,)
    if per_tensor:
        scale_a, scale_b = x_scale.reshape(()), weight_scale.reshape(())
    elif per_token:
        scale_a, scale_b = x_scale.contiguous(), weight_scale.reshape(1, -1).contiguous()
    else:
        scale_a, scale_b = x_scale.t().contiguous().t(), weight_scale.contiguous().t()
    return Prepared(
        lambda: torch._scaled_mm(
            x, weight.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype,
            use_fast_accum=fast,
        )
    )  # fmt: skip
