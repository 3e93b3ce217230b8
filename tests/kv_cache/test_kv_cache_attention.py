from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.tiny_models import CONFIGS, write_checkpoint
from support.walking import open_walker, random_batch, walk
from torch import Tensor

from llmopt.kv_cache.attention import attend, attention_through
from llmopt.kv_cache.reading import CacheView

NAMES = sorted(CONFIGS)


def as_given(layer: int, keys: Tensor, values: Tensor) -> CacheView:
    return CacheView(keys, values, torch.arange(keys.shape[2]), None)


def in_two_parts(layer: int, keys: Tensor, values: Tensor) -> CacheView:
    """Every position twice; even queries read the first copy, odd ones the second."""
    positions = torch.arange(keys.shape[2]).repeat(2)
    even = (torch.arange(keys.shape[2]) % 2 == 0)[:, None]
    first = torch.arange(len(positions)) < keys.shape[2]
    return CacheView(
        torch.cat([keys, keys], 2), torch.cat([values, values], 2), positions, first == even
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_that_reads_what_it_gave_computes_what_it_did(
    name: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "model", CONFIGS[name]())
    batches = [random_batch(2, 21), random_batch(1, 5)]
    walker = open_walker(tmp_path / "model")
    config = walker.structure.skeleton.config
    usual = config._attn_implementation
    (tmp_path / "scratch").mkdir()
    expected, _ = walk(walker, batches, tmp_path / "scratch")
    layers = set()
    for see in (as_given, in_two_parts):

        def noting(layer: int, keys: Tensor, values: Tensor, see=see) -> CacheView:  # noqa: ANN001
            layers.add(layer)
            return see(layer, keys, values)

        with attention_through(config, noting):
            found, _ = walk(walker, batches, tmp_path / "scratch")
        for given, seen in zip(expected[-1], found[-1], strict=True):
            torch.testing.assert_close(seen, given, rtol=1e-4, atol=2e-5)
    assert layers == set(range(walker.structure.num_blocks))
    assert config._attn_implementation == usual
    again, _ = walk(walker, batches, tmp_path / "scratch")
    assert all(torch.equal(a, b) for a, b in zip(again[-1], expected[-1], strict=True))


def test_a_layer_that_reads_something_else_computes_something_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", CONFIGS["llama"]())
    walker = open_walker(tmp_path / "model")
    (tmp_path / "scratch").mkdir()
    expected, _ = walk(walker, [random_batch(1, 9)], tmp_path / "scratch")

    def shifted(layer: int, keys: Tensor, values: Tensor) -> CacheView:
        return as_given(layer, keys, values + (0.1 if layer == 2 else 0.0))

    with attention_through(walker.structure.skeleton.config, shifted):
        found, _ = walk(walker, [random_batch(1, 9)], tmp_path / "scratch")
    assert torch.allclose(found[2][0], expected[2][0], atol=1e-5)
    assert not torch.allclose(found[3][0], expected[3][0], atol=1e-3)


def test_the_config_is_as_it_was_after_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", CONFIGS["llama"]())
    config = open_walker(tmp_path / "model").structure.skeleton.config
    usual = config._attn_implementation
    with pytest.raises(KeyError), attention_through(config, as_given):
        assert config._attn_implementation != usual
        raise KeyError
    assert config._attn_implementation == usual


@pytest.mark.parametrize("mask_kind", ["none", "bool", "added"])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (1.5, False), (None, True)])
def test_attention_is_the_formula(mask_kind: str, softcap: float | None, with_sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 6, 8, generator=generator)
    sinks = torch.randn(4, generator=generator) if with_sinks else None
    visible = torch.ones(6, 6).tril().bool()
    if mask_kind != "none":
        visible[4, 1] = False
    mask = {"none": None, "bool": visible[None, None]}.get(mask_kind)
    if mask_kind == "added":
        mask = torch.zeros(1, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)
    found = attend(q, as_given(0, k, v), mask, 0.3, softcap, sinks)
    for row in range(2):
        for head in range(4):
            for query in range(6):
                logits = []
                for column in range(6):
                    logit = 0.3 * float(q[row, head, query] @ k[row, head // 2, column])
                    logits.append(
                        logit if softcap is None else softcap * math.tanh(logit / softcap)
                    )
                weights = [math.exp(x) if visible[query, i] else 0.0 for i, x in enumerate(logits)]
                total = sum(weights) + (0 if sinks is None else math.exp(float(sinks[head])))
                expected = sum(w / total * v[row, head // 2, i] for i, w in enumerate(weights))
                torch.testing.assert_close(found[row, head, query], expected, rtol=1e-4, atol=1e-5)
