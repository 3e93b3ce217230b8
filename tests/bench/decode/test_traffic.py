"""The floor's bytes, against the cache as ``llmopt_kernels`` lays it out."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import CONFIGS

from llmopt.bench.decode.traffic import CacheShape, cache_shape, measure_bandwidth
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt_kernels.paged_kv import Kind, new_cache

KV_HEADS, HEAD_DIM = 2, 64
KEY_GROUP, RECENT_WINDOW = KVCacheConfig().page_size, KVCacheConfig().recent_window


@pytest.mark.parametrize(
    ("kv", "kind"), [("16-bit", "16-bit"), ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4")]
)
def test_bytes_are_those_of_the_pools(kv: str, kind: Kind) -> None:
    pages = 5
    pool = new_cache(kind, pages, KEY_GROUP, KV_HEADS, HEAD_DIM)
    tensors = [part for part in pool.tensors().values() if part is not None]
    if kind == "fp8":
        tensors = tensors[:2]  # its scales are a handful for the whole pool
    tokens = pages * KEY_GROUP
    shape = CacheShape(KV_HEADS, HEAD_DIM, (None,))
    wanted = sum(part.nbytes for part in tensors)
    if kind == "int4":
        recent = new_cache("16-bit", RECENT_WINDOW // KEY_GROUP, KEY_GROUP, KV_HEADS, HEAD_DIM)
        wanted += recent.k.nbytes + recent.v.nbytes
        tokens += RECENT_WINDOW
    assert shape.read_bytes(kv, tokens) == wanted


def test_what_is_not_quantized_has_the_element_type_that_engines_compute_in() -> None:
    narrow, wide = (CacheShape(KV_HEADS, HEAD_DIM, (None,), size) for size in (2, 4))
    assert wide.read_bytes("16-bit", 300) == 2 * narrow.read_bytes("16-bit", 300)
    assert wide.read_bytes("int8", 300) == narrow.read_bytes("int8", 300)
    recent = RECENT_WINDOW * 2 * KV_HEADS * HEAD_DIM
    assert wide.read_bytes("int4", 300) - narrow.read_bytes("int4", 300) == 2 * recent


def test_a_window_bounds_what_a_layer_reads() -> None:
    both = CacheShape(1, 4, (None, 8))
    assert both.read_bytes("16-bit", 100) == 2 * 4 * 2 * (100 + 8)
    assert both.read_bytes("16-bit", 5) == 2 * 4 * 2 * (5 + 5)


@pytest.mark.parametrize(
    ("architecture", "windows"),
    [("llama", (None,) * 3), ("mistral", (8,) * 3), ("gemma2", (8, None, 8))],
)
def test_shapes_come_from_the_config(architecture: str, windows: tuple[int | None, ...]) -> None:
    assert cache_shape(CONFIGS[architecture](), 4) == CacheShape(2, 8, windows, 4)


def test_bandwidth_is_measured_with_the_threads_asked_for() -> None:
    before = torch.get_num_threads()
    found = measure_bandwidth(1, num_bytes=1 << 22)
    assert found.bytes_per_s > 0
    assert found.threads == 1
    assert "float32" in found.method
    assert torch.get_num_threads() == before
