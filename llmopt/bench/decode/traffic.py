"""The floor of decoding: the bytes that a step must read, over what memory gives.

Floor of a step = (bytes of weights + bytes of keys and values of every sequence) / bandwidth.
Weights are read once a step whatever the batch, the cache once for each sequence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.decoding.kv_cache_config import KVCacheConfig

_ENGINE = KVCacheConfig()  # what llmopt's engine does unasked
_FLOAT_BYTES = 4
_PROBE_BYTES = 1 << 29
_PROBE_REPEATS = 9


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What memory gives.

    Attributes:
        bytes_per_s: of the fastest way to read that was tried, its median.
        method: which one that was.
        threads: of torch while it was measured.
    """

    bytes_per_s: float
    method: str
    threads: int


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a token leaves in the cache.

    Attributes:
        kv_heads: of a layer.
        head_dim: channels of one.
        windows: of every layer; none looks back to the start.
        plain_bytes: of an element that is not quantized.
    """

    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    plain_bytes: int = 2

    def read_bytes(self, kv: str, context: float) -> float:
        """What one sequence's step reads at a context of so many tokens."""
        return sum(
            self._layer_bytes(kv, min(context, window or context)) for window in self.windows
        )

    def _layer_bytes(self, kv: str, tokens: float) -> float:
        vectors = 2 * self.kv_heads  # a key and a value for each head
        plain = vectors * self.head_dim * self.plain_bytes
        if kv == "int8":
            return tokens * vectors * (self.head_dim + _FLOAT_BYTES)
        if kv == "int4":
            old = max(0.0, tokens - _ENGINE.recent_window)
            codes = vectors * self.head_dim / 2
            # Scale and minimum: of a value by token, of a key by channel over a group of tokens.
            by_value = 2 * _FLOAT_BYTES * self.kv_heads
            by_key = 2 * _FLOAT_BYTES * self.kv_heads * self.head_dim / _ENGINE.page_size
            return old * (codes + by_value + by_key) + (tokens - old) * plain
        return tokens * (vectors * self.head_dim if kv == "fp8" else plain)


def cache_shape(config: Any, plain_bytes: int = 2) -> CacheShape:
    """Of a text model's transformers config."""
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None and window:
        types = ["sliding_attention"] * config.num_hidden_layers
    return CacheShape(
        int(getattr(config, "num_key_value_heads", None) or heads),
        int(head_dim),
        tuple(window if kind == "sliding_attention" else None for kind in types),
        plain_bytes,
    )


def measure_bandwidth(
    threads: int, device: str = "cpu", num_bytes: int = _PROBE_BYTES
) -> Bandwidth:
    """Time reading a tensor larger than every cache, in two ways that do nothing else."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        columns = 2048
        rows = num_bytes // columns // _FLOAT_BYTES
        table = torch.ones(rows, columns, dtype=torch.float32, device=device)
        vector = torch.ones(columns, dtype=torch.float32, device=device)
        ways: dict[str, Callable[[], object]] = {
            "a sum in float32": table.sum,
            "a matrix-vector product in float32": lambda: table @ vector,
        }
        rates = {name: table.nbytes / _median_s(way, device) for name, way in ways.items()}
    finally:
        torch.set_num_threads(before)
    best = max(rates, key=lambda name: rates[name])
    return Bandwidth(rates[best], best, threads)


def _median_s(way: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(_PROBE_REPEATS + 1):
        _wait(device)
        started = time.perf_counter()
        way()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one pays for starting threads


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
