"""``search="compatible"`` gives the bytes that ggml gives, whatever the weights are."""

from pathlib import Path

import pytest
import torch
from quantization.ggml.samples import SAMPLES, importance, sample
from safetensors.torch import load_file

from llmopt.quantization.ggml.compatible import row_energies
from llmopt.quantization.ggml.packing import pack_blocks
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES

BLOCK_TYPES = [kind for kind in GGML_TYPES.values() if not kind.is_plain]
VECTORS = load_file(Path(__file__).parent / "vectors" / "ggml.safetensors")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_bytes_are_those_of_ggml(kind, weighted):
    theirs = VECTORS[f"{kind.name}.{'importance' if weighted else 'plain'}"]
    given = VECTORS["importance"] if weighted else None
    tensor = quantize_blocks(VECTORS["weight"], kind, importance=given, search="compatible")
    blocks = (pack_blocks(tensor) == theirs).view(len(SAMPLES), -1, kind.block_bytes).all(dim=2)
    assert bool(blocks.all()), dict(zip(SAMPLES, blocks.tolist(), strict=True))


@pytest.mark.parametrize("name", ["Q4_1", "Q3_K"])
def test_the_vectors_tell_importances_apart(name):
    assert not torch.equal(VECTORS[f"{name}.plain"], VECTORS[f"{name}.importance"])
    tensor = quantize_blocks(
        VECTORS["weight"],
        GGML_TYPES[name],
        importance=VECTORS["importance"].flip(0),
        search="compatible",
    )
    assert not torch.equal(pack_blocks(tensor), VECTORS[f"{name}.importance"])


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_chunks_change_nothing(kind, monkeypatch):
    weight = sample("heavy-tailed", 7, 512)
    whole = quantize_blocks(weight, kind, importance=importance(512), search="compatible")
    monkeypatch.setattr("llmopt.quantization.ggml.quantize._CPU_ELEMENTS", 1024)
    cut = quantize_blocks(weight, kind, importance=importance(512), search="compatible")
    assert torch.equal(pack_blocks(whole), pack_blocks(cut))


def test_energies_are_summed_left_to_right_in_single_precision():
    weight = sample("heavy-tailed", 3, 200)
    total = torch.zeros(3)
    for column in weight.unbind(1):
        total = total + column * column
    assert torch.equal(row_energies(weight), total)
    torch.testing.assert_close(total, (weight**2).sum(1))
