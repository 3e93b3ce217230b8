from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmopt.kv_cache.reading import KVCache, LayerScales, boundary, read_back
from llmopt.kv_cache.settings import KVCacheSettings

BATCH, HEADS, TOKENS, DIM = 2, 3, 71, 10


def keys_and_values(tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 4, DIM)
    made = torch.randn(2, BATCH, HEADS, tokens, DIM, generator=generator) * scale
    return made[0], made[1]


def rounded(x: Tensor, minimum: Tensor, maximum: Tensor, levels: int) -> Tensor:
    step = (maximum - minimum) / levels
    return ((x - minimum) / step).round() * step + minimum


def test_an_int8_cache_has_a_scale_for_each_token_and_head() -> None:
    k, v = keys_and_values()
    view = read_back(k, v, KVCacheSettings("int8", page_size=16), LayerScales())
    assert view.reads is None and view.positions.tolist() == list(range(TOKENS))
    for given, found in ((k, view.keys), (v, view.values)):
        step = given.abs().amax(-1, keepdim=True) / 127
        torch.testing.assert_close(found, (given / step).round() * step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scales", [LayerScales(0.03, 0.02), LayerScales(0.001, 0.5)])
def test_an_fp8_cache_has_the_scales_that_it_is_given_and_saturates(scales: LayerScales) -> None:
    k, v = keys_and_values()
    view = read_back(k, v, KVCacheSettings("fp8"), scales)
    parts = ((k, view.keys, scales.k), (v, view.values, scales.v))
    for given, found, scale in parts:
        code = (given / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(found, code * scale, rtol=1e-6, atol=0)
        assert float(found.abs().max()) <= 448 * scale * (1 + 1e-6)


@pytest.mark.parametrize(("window", "page_size"), [(1, 16), (16, 16), (20, 16), (5, 32), (200, 16)])
def test_int4_is_read_as_kivi_says_it_query_by_query(window: int, page_size: int) -> None:
    k, v = keys_and_values()
    settings = KVCacheSettings("int4", recent_window=window, page_size=page_size)
    view = read_back(k, v, settings, LayerScales())
    assert view.reads is not None
    for p in range(TOKENS):
        first = max(0, p + 1 - window) // page_size * page_size
        assert int(boundary(TOKENS, settings)[p]) == first
        for position in range(TOKENS):
            columns = (view.positions == position).nonzero().flatten()
            (column,) = columns[view.reads[p, columns]].tolist()  # each is read once
            key, value = view.keys[:, :, column], view.values[:, :, column]
            if position >= first:
                assert torch.equal(key, k[:, :, position])
                assert torch.equal(value, v[:, :, position])
                continue
            page = k[:, :, position // page_size * page_size :][:, :, :page_size]
            expected = rounded(k[:, :, position], page.amin(2), page.amax(2), 15)
            torch.testing.assert_close(key, expected, rtol=0, atol=1e-5)
            own = v[:, :, position]
            least, most = own.amin(-1, keepdim=True), own.amax(-1, keepdim=True)
            torch.testing.assert_close(value, rounded(own, least, most, 15), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_what_follows_a_query_does_not_change_what_it_reads(kind: str) -> None:
    settings = KVCacheSettings(kind, recent_window=3, page_size=16)  # type: ignore[arg-type]
    cache = KVCache(settings, (LayerScales(0.02, 0.02),) if kind == "fp8" else ())
    k, v = keys_and_values()
    shorter = 53
    whole, part = cache.see(0, k, v), cache.see(0, k[:, :, :shorter], v[:, :, :shorter])
    for p in range(shorter):
        for view in (whole, part):
            seen = view.positions <= p
            seen = seen if view.reads is None else seen & view.reads[p]
            order = view.positions[seen].argsort()
            if view is whole:
                expected = view.keys[:, :, seen][:, :, order]
            else:
                assert torch.equal(view.keys[:, :, seen][:, :, order], expected)


def test_settings_say_what_they_are() -> None:
    assert KVCacheSettings("int4", 64, 32).label == "int4, pages of 32, the last 64 in 16 bit"
    assert KVCacheSettings("fp8").label == "fp8" and KVCacheSettings("fp8").has_static_scales
    assert not KVCacheSettings("bf16").is_quantized
