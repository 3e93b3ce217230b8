"""The second decoder puts the rows of q and k back by its own knowledge of llama.cpp's graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.gguf_models import CONFIGS, open_and_plan, write_plain
from support.tiny_models import write_checkpoint

from llmopt.checkpoint.reader import CheckpointReader
from llmopt.errors import RoundTripError
from llmopt.formats.gguf.architectures.plan import FilePlan
from llmopt.formats.gguf.architectures.transforms import Transform
from llmopt.progress import silent
from llmopt.quantization.ggml.tensor import digest_values
from llmopt.roundtrip import check_gguf_round_trip

ROTATED = ("attn_q.", "attn_k.")


def digests(reader: CheckpointReader, plan: FilePlan) -> dict[str, str]:
    """Of what the checkpoint holds, tensor by tensor, rows where they are there."""
    found = {}
    for tensor in plan.tensors:
        values = [reader.read(name).float() + tensor.transform.added for name in tensor.sources]
        found[tensor.gguf_name] = digest_values(values or [tensor.assemble()])
    return found


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_family_is_read_as_the_checkpoint_has_it(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, CONFIGS[name]())
    reader, plan = open_and_plan(tmp_path)
    write_plain(tmp_path / "model.gguf", reader, plan)
    trip = check_gguf_round_trip(tmp_path / "model.gguf", digests(reader, plan), silent)
    assert trip.num_tensors == len(plan.tensors) and trip.num_mismatches == 0


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", None), ("llama", 1), ("smollm3", None), ("qwen3", 2)]
)
def test_rows_that_the_writer_left_in_the_wrong_place_are_found(
    tmp_path: Path, name: str, heads: int | None
) -> None:
    write_checkpoint(tmp_path, CONFIGS[name]())
    reader, plan = open_and_plan(tmp_path)
    faulty = replace(
        plan,
        tensors=tuple(
            replace(tensor, transform=Transform(heads=heads))
            if any(part in tensor.gguf_name for part in ROTATED) and "norm" not in tensor.gguf_name
            else tensor
            for tensor in plan.tensors
        ),
    )
    write_plain(tmp_path / "model.gguf", reader, faulty)
    with pytest.raises(RoundTripError, match=r"tensors on disk .* blk\.0\.attn_[qk]"):
        check_gguf_round_trip(tmp_path / "model.gguf", digests(reader, plan), silent)


def test_values_are_digested_alike_whatever_they_are_stored_in() -> None:
    weight = torch.randn(7, 32)
    assert digest_values([weight]) == digest_values([weight[:3], weight[3:]])
    assert digest_values([weight[0]]) == digest_values([weight[:1]])
    assert digest_values([weight]) != digest_values([weight.flip(0)])
