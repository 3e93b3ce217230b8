"""The floor's arithmetic, against counts done by hand on odd shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_jobs import write_job

from llmopt.bench.floor import (
    Floor,
    MatrixRate,
    Work,
    count_work,
    measure_matrix_rate,
    memory_bound_bytes,
)
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure

HIDDEN, INNER, HEADS, KEY_VALUE_HEADS, WIDTH, BLOCKS = 24, 40, 3, 1, 16, 2
QUERY, KEY = HEADS * WIDTH, KEY_VALUE_HEADS * WIDTH


@pytest.fixture
def structure(tmp_path: Path) -> ModelStructure:
    """A Llama whose query width differs from its hidden one."""
    source = write_job(
        tmp_path,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=WIDTH,
        num_hidden_layers=BLOCKS,
    )
    return read_structure(open_checkpoint(source))


def test_work_is_one_forward_and_a_hessian_for_each_distinct_input(
    structure: ModelStructure,
) -> None:
    samples, length = 5, 7
    weights = HIDDEN * (QUERY + 2 * KEY) + QUERY * HIDDEN + 3 * HIDDEN * INNER
    masked_attention = 2 * length**2 * QUERY  # scores and values, half of 4 T^2 d
    work = count_work(structure, samples, length)
    assert work.forward == BLOCKS * samples * (2 * length * weights + masked_attention)
    # q/k/v share an input, gate/up share one; o and down have their own.
    squares = HIDDEN**2 + QUERY**2 + HIDDEN**2 + INNER**2
    assert work.hessians == BLOCKS * samples * length * squares


def test_memory_bound_is_the_largest_block_its_hessians_and_two_hidden_states(
    structure: ModelStructure,
) -> None:
    weights = HIDDEN * (QUERY + 2 * KEY) + QUERY * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
    squares = HIDDEN**2 + QUERY**2 + HIDDEN**2 + INNER**2
    tokens = 35
    expected = 4 * (weights + squares) + 2 * 2 * tokens * HIDDEN
    assert memory_bound_bytes(structure, tokens) == expected


def test_each_floor_divides_its_work_by_its_rate() -> None:
    floor = Floor(Work(forward=800, hessians=200), MatrixRate(100.0, 400.0, threads=2))
    assert floor.float32_s == 10.0
    assert floor.mixed_s == 4.0
    assert floor.bfloat16_s == 2.5


def test_the_rate_is_measured_with_the_threads_asked_for_and_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    rate = measure_matrix_rate(threads=1, size=96)
    assert rate.threads == 1 and torch.get_num_threads() == before
    assert 1e6 < rate.float32 < 1e15 and 1e6 < rate.bfloat16 < 1e15
