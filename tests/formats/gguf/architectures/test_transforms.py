from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.formats.gguf.architectures import Transform
from llmopt.quantization.ggml.packing import pack_plain, unpack_plain
from llmopt.quantization.ggml.types import GGML_TYPES


def test_rows_of_a_head_go_in_pairs() -> None:
    # Two heads of six rows; a row of the first half is followed by its partner of the second.
    rows = torch.arange(12)[:, None]
    moved = Transform(heads=2).apply([rows])
    assert moved.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@given(
    heads=st.integers(1, 5),
    half=st.integers(1, 6),
    columns=st.integers(1, 4),
    experts=st.integers(1, 3),
    stacked=st.booleans(),
    added=st.sampled_from([0.0, 1.0]),
    bias=st.booleans(),
)
def test_what_is_applied_can_be_inverted(
    heads: int, half: int, columns: int, experts: int, stacked: bool, added: float, bias: bool
) -> None:
    rows = 2 * half * heads
    shape = (rows,) if bias else (rows, columns)
    count = experts if stacked and not added else 1
    transform = Transform(heads=heads, stacked=stacked and not added, added=added)
    parts = [torch.randn(shape).mul(256).round() / 256 for _ in range(count)]
    whole = transform.apply(parts)
    assert whole.shape == ((count, *shape) if transform.stacked else shape)
    for index, part in enumerate(parts):
        assert torch.equal(transform.invert(whole, index), part)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_packed_rows_move_as_values_do(kind: str) -> None:
    transform = Transform(heads=3, stacked=True)
    parts = [torch.randn(12, 7).to(torch.bfloat16).float() for _ in range(2)]
    moved_after = transform.apply([pack_plain(part, GGML_TYPES[kind]) for part in parts])
    moved_before = pack_plain(transform.apply(parts), GGML_TYPES[kind])
    assert moved_after.dtype == torch.uint8
    assert torch.equal(moved_after, moved_before)
    assert torch.equal(
        unpack_plain(moved_after, GGML_TYPES[kind]).float(),
        unpack_plain(moved_before, GGML_TYPES[kind]).float(),
    )


def test_a_norm_in_half_precision_gets_its_one_in_float32() -> None:
    weight = torch.tensor([2**-9, -0.5], dtype=torch.bfloat16)
    whole = Transform(added=1.0).apply([weight])
    assert whole.dtype == torch.float32
    assert whole.tolist() == [1 + 2**-9, 0.5]
    with pytest.raises(AssertionError, match="packed rows"):
        Transform(added=1.0).apply([torch.zeros(2, dtype=torch.uint8)])
