"""Faults planted in a cache: those that do damage are refused, and all are told from the sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.demo.paths import demo_model_path
from llmopt.kv_cache.reading import CacheView, KVCache, LayerScales, read_back
from llmopt.kv_cache.settings import KVCacheSettings
from llmopt.scoring import WalkerScorer
from llmopt_evals.criteria import cache_criteria
from llmopt_evals.divergence import kl_divergence

INT4 = KVCacheSettings("int4", recent_window=32, page_size=32)
FP8 = KVCacheSettings("fp8")
# Larger than any key or value of the demo model's, by layer.
FITTING = tuple(LayerScales(k / 448, v / 448) for k, v in ((5, 2), (12, 7), (9, 7), (8, 10)))
See = Callable[[Tensor, Tensor, int], CacheView]


class Planted(KVCache):
    """A cache that is read otherwise than it should be."""

    __slots__ = ("otherwise",)

    def __init__(self, settings: KVCacheSettings, otherwise: See) -> None:
        super().__init__(settings, FITTING)
        object.__setattr__(self, "otherwise", otherwise)

    def see(self, layer: int, keys: Tensor, values: Tensor) -> CacheView:
        return self.otherwise(keys, values, layer)  # type: ignore[no-any-return,attr-defined]


def times(factor: float) -> KVCache:
    return KVCache(FP8, tuple(LayerScales(s.k * factor, s.v * factor) for s in FITTING))


def read_with_another_scale(keys: Tensor, values: Tensor, layer: int) -> CacheView:
    view = read_back(keys, values, FP8, FITTING[layer])
    return CacheView(view.keys, view.values * 2, view.positions, view.reads)


def without_window(keys: Tensor, values: Tensor, layer: int) -> CacheView:
    return read_back(keys, values, KVCacheSettings("int4", 1, INT4.page_size), FITTING[layer])


def keys_by_token(keys: Tensor, values: Tensor, layer: int) -> CacheView:
    view, turned = (read_back(x, x, INT4, FITTING[layer]) for x in (values, keys))
    return CacheView(turned.values, view.values, view.positions, view.reads)


def values_by_channel(keys: Tensor, values: Tensor, layer: int) -> CacheView:
    view, turned = (read_back(x, x, INT4, FITTING[layer]) for x in (keys, values))
    return CacheView(view.keys, turned.keys, view.positions, view.reads)


def rotated(x: Tensor, positions: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    angles = sign * positions[:, None] * 10_000 ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def keys_before_rotation(keys: Tensor, values: Tensor, layer: int) -> CacheView:
    plain = rotated(keys, torch.arange(keys.shape[2]), -1)
    view = read_back(plain, values, INT4, FITTING[layer])
    return CacheView(rotated(view.keys, view.positions, 1), view.values, view.positions, view.reads)


def page_too_far(keys: Tensor, values: Tensor, layer: int) -> CacheView:
    """The codes of the page before, where there is one."""
    view = read_back(keys, values, INT4, FITTING[layer])
    full = keys.shape[2] // INT4.page_size * INT4.page_size
    moved = view.keys.clone()
    moved[:, :, INT4.page_size : full] = view.keys[:, :, : full - INT4.page_size]
    return CacheView(moved, view.values, view.positions, view.reads)


@pytest.fixture(scope="module")
def model() -> tuple[ModelStructure, object]:
    reader = open_checkpoint(demo_model_path())
    return read_structure(reader), reader


@pytest.fixture(scope="module")
def passages() -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    text = "\n".join(Path(file).read_text("utf-8") for file in (argparse_file(), json_file()))
    tokens = torch.tensor(tokenizer(text[:30_000])["input_ids"])
    return [tokens[start : start + 320] for start in range(0, 8 * 320, 320)]


def argparse_file() -> str:
    import argparse

    return argparse.__file__


def json_file() -> str:
    import json.decoder

    return json.decoder.__file__


@pytest.fixture(scope="module")
def mean_kl(
    model: tuple[ModelStructure, object],
    passages: list[Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[KVCache | None, KVCache | None], float]:
    """Of one cache from another, over the later half of the passages; ``None`` is 16-bit."""
    kept: dict[int, list[Tensor]] = {}

    def logits(cache: KVCache | None) -> list[Tensor]:
        structure, reader = model
        folder = tmp_path_factory.mktemp("scratch")
        scores = WalkerScorer(structure, reader, folder, kv_cache=cache).score(passages)  # type: ignore[arg-type]
        return [scores.logits(index, 160, 320) for index in range(len(passages))]

    def measured(cache: KVCache | None, other: KVCache | None) -> float:
        found = []
        for one in (other, cache):
            if id(one) not in kept:
                kept[id(one)] = logits(one)
            found.append(kept[id(one)])
        pairs = zip(*found, strict=True)
        return float(torch.cat([kl_divergence(a, b) for a, b in pairs]).double().mean())

    return measured


SOUND_FP8, SOUND_INT4 = KVCache(FP8, FITTING), KVCache(INT4)
SOUND_INT8 = KVCache(KVCacheSettings("int8"))
PLANTED: dict[str, tuple[KVCache, KVCache]] = {
    "scales half of what they should be": (times(0.5), SOUND_FP8),
    "values read with twice the scale": (Planted(FP8, read_with_another_scale), SOUND_FP8),
    "window ignored": (Planted(INT4, without_window), SOUND_INT4),
    "keys by token": (Planted(INT4, keys_by_token), SOUND_INT4),
    "values by channel": (Planted(INT4, values_by_channel), SOUND_INT4),
    "keys before their rotation": (Planted(INT4, keys_before_rotation), SOUND_INT4),
    "codes of the page before": (Planted(INT4, page_too_far), SOUND_INT4),
}
REFUSED = {
    "scales half of what they should be",
    "values read with twice the scale",
    "codes of the page before",
}
"""By the margin alone; the others do less damage than it allows, and are told by comparison."""


@pytest.mark.parametrize(
    "cache", [SOUND_INT8, SOUND_FP8, SOUND_INT4], ids=lambda c: c.settings.kind
)
def test_a_sound_cache_keeps_well_inside_its_margin(
    cache: KVCache, mean_kl: Callable[[KVCache | None, KVCache | None], float]
) -> None:
    (margin,) = (c.margin for c in cache_criteria(cache.settings.kind) if c.metric == "kv_mean_kl")
    found = mean_kl(cache, None)
    print(f"{cache.settings.label}: {found:.2e} nats, margin {margin}")
    assert 0 < found < margin / 2


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_refused_or_told_from_the_sound_cache(
    name: str, mean_kl: Callable[[KVCache | None, KVCache | None], float]
) -> None:
    planted, sound = PLANTED[name]
    (margin,) = (c.margin for c in cache_criteria(sound.settings.kind) if c.metric == "kv_mean_kl")
    damage, own = mean_kl(planted, None), mean_kl(sound, None)
    apart = mean_kl(planted, sound)
    print(f"{name}: {damage:.2e} nats (sound {own:.2e}, apart {apart:.2e}), margin {margin}")
    assert (damage > margin) == (name in REFUSED)
    # The engine is held to the gate's reading: logits that are this far apart fail that test.
    assert apart > own / 5


def test_scales_twice_as_large_cost_nothing_and_only_the_round_trip_tells(
    mean_kl: Callable[[KVCache | None, KVCache | None], float],
) -> None:
    """Floating-point codes do not mind a larger scale, as long as none falls below their range."""
    assert mean_kl(times(2.0), None) < 1.2 * mean_kl(SOUND_FP8, None)
