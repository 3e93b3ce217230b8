"""Attention over a quantized cache by its definition: float64, query by query, no pages, no codes.

Nothing of it is shared with the product but what a kind of cache means.
"""

import torch

STEPS = {"int4": 15, "int8": 127, "fp8": 448}


def as_read(kind, x, scale=1.0):
    """``(tokens, channels) float64``: what int8 or fp8 gives back of each token."""
    if kind == "int8":
        step = x.abs().amax(-1, keepdim=True).float().div(127).double()
        step = torch.where(step == 0, 1.0, step)
        return torch.round((x / step).float().double()) * step
    if kind == "fp8":
        scaled = (x.float() / torch.tensor(scale)).clamp(-448, 448)
        return scaled.to(torch.float8_e4m3fn).double() * scale
    return x


def int4_pages(x, page_size, by_channel):
    """What int4 gives back of every full page; the rest is NaN."""
    back = torch.full_like(x, torch.nan)
    for begin in range(0, len(x) - page_size + 1, page_size):
        page = x[begin : begin + page_size].float()
        axis = 0 if by_channel else 1
        low, high = page.amin(axis, keepdim=True), page.amax(axis, keepdim=True)
        step = (high - low) / 15
        back[begin : begin + page_size] = torch.round((page - low) / step).double() * step + low
    return back


def slow_attention(
    q, k, v, *, kind="auto", page_size=16, recent=32, window=None, softcap=None, sinks=None,
    scale=1.0, k_scale=None, v_scale=None,
):  # fmt: skip
    """One sequence from its first token on.

    Args:
        q: ``(heads, tokens, channels)``; k and v ``(kv_heads, tokens, channels)``.

    Returns:
        ``(tokens, heads, channels) float64``.
    """
    heads, tokens, channels = q.shape
    out = torch.zeros(tokens, heads, channels, dtype=torch.float64)
    for head in range(heads):
        kv = head // (heads // len(k))
        exact_k, exact_v = k[kv].double(), v[kv].double()
        read_k = as_read(kind, exact_k, k_scale[kv] if k_scale else 1.0)
        read_v = as_read(kind, exact_v, v_scale[kv] if v_scale else 1.0)
        page_k, page_v = int4_pages(exact_k, page_size, True), int4_pages(exact_v, page_size, False)
        for p in range(tokens):
            first = 0 if window is None else max(0, p + 1 - window)
            ks, vs = read_k[first : p + 1].clone(), read_v[first : p + 1].clone()
            if kind == "int4" and (window is None or window > recent):
                boundary = max(0, p + 1 - recent) // page_size * page_size
                if boundary > first:
                    ks[: boundary - first] = page_k[first:boundary]
                    vs[: boundary - first] = page_v[first:boundary]
            scores = ks @ q[head, p].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].double()[None]])
            out[p, head] = scores.softmax(0)[: len(vs)] @ vs
    return out
