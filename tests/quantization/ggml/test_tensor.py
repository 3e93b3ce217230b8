import hashlib

import pytest
import torch
from quantization.ggml.random_blocks import random_bytes

from llmopt.quantization.ggml import tensor as module
from llmopt.quantization.ggml.packing import unpack_blocks
from llmopt.quantization.ggml.types import GGML_TYPES

BLOCK_TYPES = [name for name, kind in GGML_TYPES.items() if not kind.is_plain]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_weight_is_its_level_in_steps_plus_a_shift(name):
    kind = GGML_TYPES[name]
    tensor = unpack_blocks(random_bytes(kind, 3, 2, seed=0), kind, 2 * kind.block_size)
    levels = kind.levels()[tensor.codes.long()]
    steps = tensor.step_sizes().repeat_interleave(kind.sub_block, dim=1)
    expected = levels * steps
    if kind.min_sign:
        expected += tensor.shifts().repeat_interleave(kind.sub_block, dim=1)
    else:
        assert tensor.shifts() is None
    assert torch.equal(tensor.dequantize(), expected)
    assert torch.equal(tensor.dequantize(torch.bfloat16), expected.bfloat16())


def test_the_digest_is_of_the_dequantized_bytes(monkeypatch):
    kind = GGML_TYPES["Q3_K"]
    tensor = unpack_blocks(random_bytes(kind, 5, 2, seed=0), kind, 512)
    expected = hashlib.sha256(tensor.dequantize().numpy().tobytes()).hexdigest()
    assert tensor.digest() == expected
    monkeypatch.setattr(module, "_DIGEST_ELEMENTS", 1024)  # two rows at a time
    assert tensor.digest() == expected


def test_rows_are_taken_with_all_their_parts():
    kind = GGML_TYPES["Q4_K"]
    tensor = unpack_blocks(random_bytes(kind, 6, 2, seed=0), kind, 512)
    rows = slice(1, None, 2)
    assert torch.equal(tensor.take_rows(rows).dequantize(), tensor.dequantize()[rows])
