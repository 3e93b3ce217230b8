"""Every layer gets the scheme that is meant for it, under each name a consumer looks it up by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    gemma3_multimodal_config,
    llama_config,
    mixtral_config,
    qwen3_moe_config,
    rewrite_tensors,
    write_checkpoint,
)
from torch import Tensor

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.formats.compressed_tensors import CompressedTensors, CompressedTensorsSchemes
from llmopt.naming import config_names, ignored_names
from llmopt.quantization.scheme import Scheme

W4, W8 = Scheme(bits=4, group_size=16), Scheme(bits=8, group_size=16)
KEPT = ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj")
HUB, MEMORY = "language_model.model.", "model.language_model."
VISION = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"

Change = Callable[[dict[str, Tensor]], None]


def add(*names: str) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(4, 4) for name in names})


def strip_body(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def strip_body_and_add_mtp(tensors: dict[str, Tensor]) -> None:
    strip_body(tensors)
    add("layers.3.mlp.up_proj.weight")(tensors)


def leftovers(prefix: str) -> Change:
    """A stale buffer, an MTP layer, a bias nobody has, and a stray part called as the blocks."""
    return add(
        f"{prefix}layers.0.self_attn.rotary_emb.inv_freq",
        f"{prefix}layers.3.mlp.up_proj.weight",
        f"{prefix}layers.0.mlp.up_proj.input_scale",
        "mtp.layers.0.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.weight",
    )


CASES: dict[str, tuple[bool, bool, Change, tuple[str, ...], tuple[str, ...]]] = {
    # name: wrapper, names in memory, change, prefixes looked up, other modules that are not packed
    "plain": (False, False, add(), ("model.",), ("lm_head",)),
    "plain with an MTP layer": (
        False,
        False,
        add("model.layers.3.mlp.up_proj.weight"),
        ("model.",),
        ("lm_head", "model.layers.3.mlp.up_proj"),
    ),
    "base-model save": (False, False, strip_body, ("", "model."), ("lm_head",)),
    "base-model save with an MTP layer": (
        False,
        False,
        strip_body_and_add_mtp,
        ("", "model."),
        ("lm_head", "layers.3.mlp.up_proj"),
    ),
    "wrapper, hub names": (
        True,
        False,
        add(),
        (HUB, MEMORY),
        ("lm_head", "language_model.lm_head", VISION, f"model.{VISION}"),
    ),
    "wrapper, names in memory": (
        True,
        True,
        add(),
        (HUB, MEMORY),
        ("lm_head", "language_model.lm_head", VISION, f"model.{VISION}"),
    ),
    "wrapper, hub names, leftovers": (
        True,
        False,
        leftovers(HUB),
        (HUB, MEMORY),
        ("lm_head", f"{HUB}layers.3.mlp.up_proj", "mtp.layers.0.mlp.up_proj", f"model.{VISION}"),
    ),
    "wrapper, names in memory, leftovers": (
        True,
        True,
        leftovers(MEMORY),
        (HUB, MEMORY),
        ("lm_head", f"{MEMORY}layers.3.mlp.up_proj", "mtp.layers.0.mlp.up_proj", VISION),
    ),
}


def inner_names(structure: ModelStructure) -> list[str]:
    """All linear layers of the blocks, relative to the body."""
    return [
        f"layers.{block}.{name}"
        for block in range(structure.num_blocks)
        for name in structure.linear_names(block)
    ]


def written_table(folder: Path, structure: ModelStructure, mixed: bool) -> CompressedTensorsSchemes:
    schemes = {
        f"model.{name}": W8 if mixed and name.endswith("down_proj") else W4
        for name in inner_names(structure)
        if f"model.{name}" not in KEPT
    }
    ignored = ignored_names(open_checkpoint(folder), structure, KEPT)
    form = CompressedTensors()
    return form.schemes(form.config(config_names(structure, schemes), ignored))


@pytest.mark.parametrize("mixed", [False, True], ids=["one scheme", "mixed schemes"])
@pytest.mark.parametrize("case", CASES)
def test_each_layer_has_its_scheme_and_each_ignored_one_none(
    case: str, mixed: bool, tmp_path: Path
) -> None:
    wrapper, in_memory, change, prefixes, others = CASES[case]
    config = gemma3_multimodal_config() if wrapper else llama_config()
    write_checkpoint(tmp_path, config, names_in_memory=in_memory)
    rewrite_tensors(tmp_path, change)
    structure = read_structure(open_checkpoint(tmp_path))
    table = written_table(tmp_path, structure, mixed)
    inner = inner_names(structure)
    assert len(inner) == 3 * 7
    assert structure.disk_module(f"model.{inner[0]}") in {
        f"{start}{inner[0]}" for start in prefixes
    }
    for prefix in prefixes:
        for name in inner:
            meant = W8 if mixed and name.endswith("down_proj") else W4
            expected = None if f"model.{name}" in KEPT else meant
            assert table.scheme_of(f"{prefix}{name}") == expected, f"{prefix}{name}"
    for name in others:
        assert table.scheme_of(name) is None, name


def test_a_plain_model_is_listed_by_exact_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    structure = read_structure(open_checkpoint(tmp_path))
    assert list(config_names(structure, {KEPT[0]: W4})) == [KEPT[0]]
    assert ignored_names(open_checkpoint(tmp_path), structure, KEPT) == ("lm_head", *KEPT)


def test_a_component_is_one_pattern(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, gemma3_multimodal_config())
    structure = read_structure(open_checkpoint(tmp_path))
    ignored = ignored_names(open_checkpoint(tmp_path), structure, ())
    assert len([name for name in ignored if "vision_tower" in name]) == 1
    assert len([name for name in ignored if "multi_modal_projector" in name]) == 1


@pytest.mark.parametrize(
    ("config", "routers"),
    [
        (mixtral_config(), [f"model.layers.{i}.block_sparse_moe.gate" for i in range(3)]),
        (qwen3_moe_config(), [f"model.layers.{i}.mlp.gate" for i in (0, 2)]),
    ],
)
def test_routers_are_ignored_and_experts_named_as_they_are_on_disk(
    config: Any, routers: list[str], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, config)
    reader = open_checkpoint(tmp_path)
    structure = read_structure(reader)
    assert list(ignored_names(reader, structure, kept=())) == ["lm_head", *routers]
    expert = next(name for name in reader.names if "experts.3." in name).removesuffix(".weight")
    memory = next(m for m, disk in structure.disk_names.items() if disk == f"{expert}.weight")
    assert list(config_names(structure, {memory.removesuffix(".weight"): W4})) == [expert]
