from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from support import gguf_models, tiny_models
from support.gguf_models import CONFIGS, open_and_plan, write_plain

from llmopt.checkpoint.structure import read_structure
from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures import plan_file
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.source import GGUFSource


def write_model(directory: Path, name: str, **changes: Any) -> Any:
    """A random checkpoint whose norms are such that 1 + w is exact in float32."""
    model = tiny_models.write_checkpoint(directory, CONFIGS[name](**changes), seed=3)

    def coarser(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if tensor.ndim == 1:
                tensors[key] = (tensor * 512).round() / 512

    tiny_models.rewrite_tensors(directory, coarser)
    return type(model).from_pretrained(directory, dtype=torch.float32).eval()


def text_names(names: tuple[str, ...]) -> dict[str, str]:
    """Names of the text model without a wrapper's prefix -> as they are."""
    return {
        name.replace("language_model.model.", "model."): name
        for name in names
        if "vision" not in name and "multi_modal" not in name
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_reads_back_as_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "source", name)
    reader, plan = open_and_plan(tmp_path / "source")
    write_plain(tmp_path / "m.gguf", reader, plan)
    source = GGUFSource(tmp_path / "m.gguf")
    expected = text_names(reader.names)
    assert set(source.names) == set(expected)
    for found in source.names:
        original = reader.read(expected[found])
        assert torch.equal(source.read(found), original), found
        assert source.info(found).shape == tuple(original.shape)
        if found.endswith(".weight"):
            assert source.scheme_of(found.removesuffix(".weight")).name == "F32"
    assert source.quantized_modules == ()
    assert_computes_the_same(source, model, length=gguf_models.WINDOW)


def assert_computes_the_same(source: GGUFSource, model: Any, length: int) -> None:
    """The config rebuilt from the metadata gives a model with the source's logits."""
    structure = read_structure(source)
    rebuilt = type(structure.skeleton)(structure.text_config).to(torch.float32).eval()
    state = {}
    for memory, disk in structure.disk_names.items():
        state[memory] = source.read(disk)
    for key in list(state):
        if ".experts." in key:
            state.pop(key)
    fused = rebuilt.state_dict()
    for key in fused:
        if ".experts." in key:
            state[key] = _fused(source, structure.disk_names, key, fused[key].shape[0])
    if structure.tied_head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    rebuilt.load_state_dict(state)
    tokens = torch.arange(1, length + 1)[None] * 7 % tiny_models.VOCABULARY
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        found = rebuilt(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def _fused(source: GGUFSource, names: Any, key: str, experts: int) -> torch.Tensor:
    prefix, _, part = key.rpartition(".")
    parts = ["gate_proj", "up_proj"] if part == "gate_up_proj" else ["down_proj"]
    return torch.stack(
        [
            torch.cat([source.read(names[f"{prefix}.{e}.{p}.weight"]) for p in parts])
            for e in range(experts)
        ]
    )


@pytest.mark.parametrize("name", ["llama3_biased", "phi3_longrope", "mixtral", "gemma3"])
def test_a_file_can_be_made_of_a_file(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "source", name)
    reader, plan = open_and_plan(tmp_path / "source")
    write_plain(tmp_path / "first.gguf", reader, plan)
    first = GGUFSource(tmp_path / "first.gguf")
    write_plain(tmp_path / "second.gguf", first, plan_file(read_structure(first), first.config))
    second = GGUFSource(tmp_path / "second.gguf")
    assert set(second.names) == set(first.names)
    assert all(torch.equal(second.read(key), first.read(key)) for key in first.names)
    assert second.config == first.config


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_windows_are_read_back(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "source", name)
    reader, plan = open_and_plan(tmp_path / "source")
    write_plain(tmp_path / "m.gguf", reader, plan)
    assert_computes_the_same(GGUFSource(tmp_path / "m.gguf"), model, length=3 * gguf_models.WINDOW)


@pytest.mark.parametrize("name", ["llama3_biased", "mixtral", "gemma3", "phi3"])
def test_an_independent_reader_finds_the_same_values(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "source", name)
    reader, plan = open_and_plan(tmp_path / "source")
    write_plain(tmp_path / "m.gguf", reader, plan, kind="BF16")
    file = GGUFFile(tmp_path / "m.gguf")
    source = GGUFSource(tmp_path / "m.gguf")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(tensors) == set(file.names)
    for hf_name in source.names:
        values = dequantize(
            tensors[source.gguf_name(hf_name)].data, tensors[source.gguf_name(hf_name)].tensor_type
        )
        ours = source.read(hf_name).numpy()
        # Rows have moved and experts are stacked; what moved is proven by the logits.
        stacked = values.size != ours.size
        expert = int(hf_name.split("experts.")[1].split(".")[0]) if stacked else 0
        theirs = values[expert] if stacked else values
        added = "norm" in hf_name and name.startswith("gemma")
        np.testing.assert_array_equal(
            np.sort(theirs.ravel()), np.sort((ours + np.float32(added)).ravel())
        )


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    reader, plan = open_and_plan(tmp_path / "source")
    write_plain(tmp_path / "m.gguf", reader, plan)
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"llama", b"rwkv7"))
    with pytest.raises(BadInputError, match="'rwkv7'.*does not know"):
        GGUFSource(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"llama.context_length", b"llama.context_lengtX", "does not say llama.context_length"),
        (b"token_embd.weight", b"token_embX.weight", "no whole language model"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_uX.weight", "blk.0.ffn_uX.weight.*no place"),
        (b"llama.attention.head_count\x04", b"llama.attention.head_count\x05", None),
    ],
)
def test_a_file_without_what_a_model_needs_is_refused(
    old: bytes, new: bytes, message: str | None, tmp_path: Path
) -> None:
    write_model(tmp_path / "source", "llama")
    reader, plan = open_and_plan(tmp_path / "source")
    write_plain(tmp_path / "m.gguf", reader, plan)
    raw = (tmp_path / "m.gguf").read_bytes()
    assert old in raw
    (tmp_path / "m.gguf").write_bytes(raw.replace(old, new))
    if message is None:  # a signed count is a count
        assert GGUFSource(tmp_path / "m.gguf").config["num_attention_heads"] == 4
        return
    with pytest.raises(BadInputError, match=message):
        GGUFSource(tmp_path / "m.gguf")
