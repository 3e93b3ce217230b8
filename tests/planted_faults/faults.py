"""Planted faults: what goes wrong in converters and packers, done to the bytes of an artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt.formats.bitstream import pack_rows, unpack_rows
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme

Tensors = dict[str, Tensor]
Base = Literal["int4-gptq", "int4-gptq asymmetric", "int4-gptq with biases"]

BLOCKS = range(4)
HEAD_SIZE = 64
GROUP_SIZE = 128
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        name: as the table has it.
        base: the sound artifact that it is planted in.
        stage: where it would come in. What goes wrong before the digest for the round trip is
            taken (in converting or solving a weight) the round trip cannot see.
        change: of the artifact's tensors, by name on disk.
        verdict: of the default criteria; ``small``: within the margins, or too near to them for
            the test's small sample (docs/gate.md says which).
    """

    name: str
    base: Base
    stage: Literal["solving", "packing", "copying"]
    change: Callable[[Tensors], None]
    verdict: Literal["fail", "small", "not opened"] = "fail"


def plant(fault: Fault, artifact: Path, copy: Path) -> Path:
    """Write a copy of a sound artifact with the fault in it."""
    shutil.copytree(artifact, copy)
    shards = {path: load_file(path) for path in sorted(copy.glob("*.safetensors"))}
    tensors = {name: tensor.clone() for shard in shards.values() for name, tensor in shard.items()}
    files = {name: path for path, shard in shards.items() for name in shard}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    fault.change(tensors)
    assert not _equal(before, tensors), f"{fault.name} changes nothing"
    for path, shard in shards.items():
        kept = {name: tensors[name].contiguous() for name in shard if name in tensors}
        save_file(kept, path, {"format": "pt"})
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: files[name].name for name in tensors}
    index.write_text(json.dumps(content))
    return copy


def _equal(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def module(block: int, linear: str) -> str:
    return f"model.layers.{block}.{linear}"


def swap_nibbles(*modules: str) -> Callable[[Tensors], None]:
    """The two codes of every byte in the wrong order."""

    def change(tensors: Tensors) -> None:
        for name in modules:
            packed = tensors[f"{name}.weight_packed"].view(torch.uint8)
            swapped = (packed << 4) | (packed >> 4)
            tensors[f"{name}.weight_packed"] = swapped.view(torch.int32)

    return change


def shift_codes(step: int, *modules: str) -> Callable[[Tensors], None]:
    """A symmetric scheme's zero point off by one, the range clamped."""

    def change(tensors: Tensors) -> None:
        for name in modules:
            codes = _codes(tensors, name).to(torch.int16) + step
            _set_codes(tensors, name, codes.clamp(0, 15).to(torch.uint8))

    return change


def shift_zero_points(step: int, *modules: str) -> Callable[[Tensors], None]:
    """Stored zero points off by one (the GPTQ v1 convention read as v2, or the reverse)."""

    def change(tensors: Tensors) -> None:
        for name in modules:
            key = f"{name}.weight_zero_point"
            rows = tensors[f"{name}.weight_scale"].shape[0]
            points = unpack_rows(tensors[key].t().contiguous(), 4, rows).to(torch.int16)
            shifted = (points + step).clamp(0, 15).to(torch.uint8)
            tensors[key] = pack_rows(shifted, 4).t().contiguous()

    return change


def round_to_two_bits(*modules: str) -> Callable[[Tensors], None]:
    """Plain rounding to four levels, stored in the four-bit format."""
    two_bits = Scheme(bits=2, group_size=GROUP_SIZE)

    def change(tensors: Tensors) -> None:
        for name in modules:
            scales = tensors[f"{name}.weight_scale"]
            steps = scales.float().repeat_interleave(GROUP_SIZE, dim=1)
            weight = (_codes(tensors, name).float() - 8) * steps
            rounded = rtn(weight, two_bits, scale_dtype=scales.dtype)
            _set_codes(tensors, name, rounded.codes - two_bits.midpoint + 8)
            tensors[f"{name}.weight_scale"] = rounded.scales

    return change


def reorder_heads(order: Callable[[Tensor], Tensor], *modules: str) -> Callable[[Tensors], None]:
    """Rows in another order; ``order`` takes ``(heads, head size)`` row numbers."""

    def change(tensors: Tensors) -> None:
        for name in modules:
            for part in ("weight_packed", "weight_scale"):
                tensor = tensors[f"{name}.{part}"]
                rows = order(torch.arange(len(tensor)).view(-1, HEAD_SIZE)).reshape(-1)
                tensors[f"{name}.{part}"] = tensor[rows]

    return change


def rolled(rows: Tensor) -> Tensor:
    """Every head's rows where the next head's belong."""
    return rows.roll(1, dims=0)


def interleaved(rows: Tensor) -> Tensor:
    """Rotary pairs side by side, as in the original Llama files, instead of in two halves."""
    return rows.view(-1, 2, HEAD_SIZE // 2).transpose(1, 2)


def shift_scales(*modules: str) -> Callable[[Tensors], None]:
    """The scales of each group where the next group's belong."""

    def change(tensors: Tensors) -> None:
        for name in modules:
            key = f"{name}.weight_scale"
            tensors[key] = tensors[key].roll(1, dims=1)

    return change


def copy_norm(wrong: int, right: int, norm: str) -> Callable[[Tensors], None]:
    """A norm's weight read from another block."""

    def change(tensors: Tensors) -> None:
        source = tensors[f"{module(wrong, norm)}.weight"]
        tensors[f"{module(right, norm)}.weight"] = source.clone()

    return change


def zero_bias(*modules: str) -> Callable[[Tensors], None]:
    """A bias that its reader leaves at zero."""

    def change(tensors: Tensors) -> None:
        for name in modules:
            tensors[f"{name}.bias"] = torch.zeros_like(tensors[f"{name}.bias"])

    return change


def remove_bias(*modules: str) -> Callable[[Tensors], None]:
    """A bias that is not written."""

    def change(tensors: Tensors) -> None:
        for name in modules:
            del tensors[f"{name}.bias"]

    return change


def _codes(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    columns = int(tensors[f"{name}.weight_shape"][1])
    return unpack_rows(tensors[f"{name}.weight_packed"], 4, columns)


def _set_codes(tensors: Tensors, name: str, codes: Tensor) -> None:
    tensors[f"{name}.weight_packed"] = pack_rows(codes, 4)
