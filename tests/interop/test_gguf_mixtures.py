"""llama.cpp's own quantizer gives every tensor the type that ours gives it."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.protocol import CONSUMERS_FOLDER

from llmopt.bench.environments import clean_variables
from llmopt.formats.gguf.architectures import ModelFacts
from llmopt.formats.gguf.architectures.tables import FAMILIES, Family
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.mixtures import MIXTURES, tensor_types
from llmopt.formats.gguf.values import TypedValue, float32, string, uint32
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.types import GGML_TYPES

ROWS = 2  # the rules look at a row's width, not at how many there are


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a model that the rules look at."""

    family: Family
    num_blocks: int = 17
    num_heads: int = 4
    num_key_value_heads: int = 2
    num_experts: int = 0
    width: int = 256
    inner: int = 512
    tied: bool = False

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(
            self.family.architecture,
            self.num_blocks,
            self.num_heads,
            self.num_key_value_heads,
            self.num_experts,
        )

    @property
    def metadata(self) -> dict[str, TypedValue]:
        values = {
            "context_length": uint32(64),
            "embedding_length": uint32(self.width),
            "block_count": uint32(self.num_blocks),
            "feed_forward_length": uint32(self.inner),
            "attention.head_count": uint32(self.num_heads),
            "attention.head_count_kv": uint32(self.num_key_value_heads),
            "attention.layer_norm_rms_epsilon": float32(1e-6),
            "attention.key_length": uint32(64),
            "attention.value_length": uint32(64),
            "rope.dimension_count": uint32(64),
        }
        if self.num_experts:
            values |= {
                "expert_count": uint32(self.num_experts),
                "expert_used_count": uint32(2),
                "expert_feed_forward_length": uint32(self.inner),
            }
        prefixed = {f"{self.family.architecture}.{key}": value for key, value in values.items()}
        return {"general.type": string("model"), **prefixed}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the file."""
        yield "token_embd.weight", (ROWS, self.width)
        for block in range(self.num_blocks):
            for base in self.family.block_names.values():
                if base.endswith("norm"):
                    shape: tuple[int, ...] = (self.width,)
                elif "ffn_down" in base:
                    shape = (ROWS, self.inner)
                else:
                    shape = (ROWS, self.width)
                stack = (self.num_experts, *shape) if base.endswith("exps") else shape
                yield f"blk.{block}.{base}.weight", stack
                if base in self.family.biases:
                    yield f"blk.{block}.{base}.bias", (self.width,)
        yield "output_norm.weight", (self.width,)
        if not self.tied:
            yield "output.weight", (ROWS, self.width)


def shapes() -> dict[str, Shape]:
    found = {}
    for family in FAMILIES:
        experts = 4 if family.has_experts else 0
        name = family.model_types[0]
        found[name] = Shape(family, num_experts=experts, tied=family.tied_head)
        found[f"{name}, few blocks"] = Shape(
            family, num_blocks=5, num_experts=experts, tied=not family.own_head
        )
        found[f"{name}, shared heads"] = Shape(
            family, num_blocks=32, num_heads=8, num_experts=experts, tied=family.tied_head
        )
        found[f"{name}, odd rows"] = Shape(
            family, width=288, inner=320, num_experts=experts, tied=family.tied_head
        )
        found[f"{name}, very odd rows"] = Shape(
            family, width=40, inner=264, num_experts=experts, tied=not family.own_head
        )
        if family.has_experts:
            found[f"{name}, eight"] = Shape(family, num_experts=8)
            found[f"{name}, eight, odd"] = Shape(family, num_experts=8, width=288, inner=264)
        found[f"{name}, 80 blocks"] = Shape(
            family, num_blocks=80, num_experts=2 * experts, tied=family.tied_head
        )
        found[f"{name}, 80 blocks, no shared heads"] = Shape(
            family, num_blocks=80, num_heads=2, num_experts=experts, tied=family.tied_head
        )
    return found


def write(path: Path, shape: Shape) -> None:
    entries = [TensorEntry(name, GGML_TYPES["F32"], size) for name, size in shape.tensors()]

    def packed(entry: TensorEntry) -> torch.Tensor:
        return torch.randn(entry.shape).view(torch.uint8)

    write_gguf(path, shape.family.architecture, shape.metadata, entries, packed)


def run_jobs(python: Path, jobs: Sequence[dict[str, Any]], folder: Path) -> None:
    request = folder / "request.json"
    request.write_text(json.dumps(jobs), "utf-8")
    done = subprocess.run(
        [str(python), str(CONSUMERS_FOLDER / "quantize_with_llama_cpp.py"), str(request)],
        cwd=folder,
        env=clean_variables(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def check_types(python: Path, shape: Shape, folder: Path) -> int:
    """Hold every mixture's types against llama.cpp's, with and without importance."""
    source = folder / "source.gguf"
    write(source, shape)
    matrices = {name: size for name, size in shape.tensors() if len(size) > 1}
    importance = {name: math.prod(size[:-2]) * size[-1] for name, size in matrices.items()}
    jobs = [
        {
            "source": str(source),
            "target": str(folder / f"{mixture.name}-{weighted}.gguf"),
            "file_type": mixture.file_type,
            "importance": importance if weighted else None,
        }
        for mixture in MIXTURES.values()
        for weighted in (False, True)
    ]
    run_jobs(python, jobs, folder)
    compared = 0
    for mixture in MIXTURES.values():
        for weighted in (False, True):
            file = GGUFFile(folder / f"{mixture.name}-{weighted}.gguf")
            assert file.metadata["general.file_type"] == mixture.file_type
            types = tensor_types(mixture, shape.facts, shape.tensors(), has_importance=weighted)
            ours = {name: chosen.type.name for name, chosen in types.items()}
            theirs = {name: file.info(name).type.name for name in file.names}
            assert ours == theirs, (mixture.name, weighted)
            compared += len(ours)
    return compared


@pytest.mark.interop
@pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)
@pytest.mark.parametrize("name", shapes())
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(
    python: Path, name: str, tmp_path: Path
) -> None:
    assert check_types(python, shapes()[name], tmp_path) > 0
