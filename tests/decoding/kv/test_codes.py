"""Our codes of 16-bit keys and values are, bit for bit, those of the kernels' operations."""

import torch

from llmopt.decoding.kv.codes import (
    KEY_AXIS,
    VALUE_AXIS,
    decode_fp8,
    decode_int4,
    decode_int8,
    encode_fp8,
    encode_int4,
    encode_int8,
)
from llmopt_kernels import kv_cache_write, kv_page_quantize
from llmopt_kernels.paged_kv import dequantize_pages, new_cache

PAGES, PAGE, HEADS, CHANNELS = 3, 16, 2, 64


def drawn():
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(PAGES * PAGE, HEADS, CHANNELS, generator=generator) for _ in range(2))
    k[:, :, 5] = 3.0  # a constant channel
    v[7] = 0.0
    return k.bfloat16(), v.bfloat16()


def written(kind):
    k, v = drawn()
    cache = new_cache(kind, PAGES, PAGE, HEADS, CHANNELS)
    if kind == "fp8":
        cache.k_scale.copy_(torch.tensor([0.01, 0.5]))
    kv_cache_write(k, v, torch.arange(PAGES * PAGE), cache)
    return k.transpose(0, 1), cache


def test_fp8():
    k, cache = written("fp8")
    scale = cache.k_scale[:, None]
    codes = encode_fp8(k, scale)
    in_pages = codes.transpose(0, 1).reshape(cache.k.shape)
    assert torch.equal(in_pages.view(torch.uint8), cache.k.view(torch.uint8))
    back, _ = dequantize_pages(cache, torch.arange(PAGES), torch.float32)
    assert torch.equal(decode_fp8(codes, scale, torch.float32), back.flatten(0, 1).transpose(0, 1))


def test_every_fp8_code_is_decoded_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    back = decode_fp8(codes[None, None], torch.full((1, 1), 2.0), torch.float32)[0, 0]
    torch.testing.assert_close(back, codes.float() * 2, rtol=0, atol=0, equal_nan=True)


def test_int8():
    k, cache = written("int8")
    codes, scale = encode_int8(k)
    assert torch.equal(codes.transpose(0, 1).reshape(cache.k.shape), cache.k)
    assert torch.equal(scale.T.reshape(cache.k_scale.shape), cache.k_scale)
    back, _ = dequantize_pages(cache, torch.arange(PAGES), torch.float32)
    assert torch.equal(decode_int8(codes, scale, torch.float32), back.flatten(0, 1).transpose(0, 1))


def test_int4():
    _, source = written("16-bit")
    cache = new_cache("int4", PAGES, PAGE, HEADS, CHANNELS)
    pages = torch.arange(PAGES)
    kv_page_quantize(source, pages, cache, pages)
    k_back, v_back = dequantize_pages(cache, pages, torch.float32)
    for x, axis, want, back in (
        (source.k, KEY_AXIS, (cache.k, cache.k_scale, cache.k_min), k_back),
        (source.v, VALUE_AXIS, (cache.v, cache.v_scale, cache.v_min), v_back),
    ):
        codes, scale, minimum = encode_int4(x, axis)
        for got, expected in zip((codes, scale, minimum), want, strict=True):
            assert torch.equal(got, expected)
        scale, minimum = scale.unsqueeze(axis), minimum.unsqueeze(axis)
        torch.testing.assert_close(decode_int4(codes, scale, minimum, torch.float32), back)


def test_what_is_not_finite_stays_so():
    page = torch.ones(1, PAGE, 1, 4)
    page[0, 3, 0, 1] = torch.nan
    codes, scale, minimum = encode_int4(page, KEY_AXIS)
    back = decode_int4(codes, scale[:, None], minimum[:, None], torch.float32)
    assert bool(back[..., 1].isnan().all()) and not bool(back[..., 0].isnan().any())
