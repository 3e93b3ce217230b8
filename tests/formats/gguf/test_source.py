from __future__ import annotations

import contextlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import gguf_models, tiny_models
from support.gguf_models import CONFIGS, open_and_plan, write_plain

from llmopt.checkpoint.structure import read_structure
from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures import FilePlan, plan_file
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.source import GGUFSource
from llmopt.formats.gguf.values import ValueType
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.packing import pack_plain
from llmopt.quantization.ggml.types import GGML_TYPES


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
        (b"blk.2.ffn_up.weight", b"blk.7.ffn_up.weight", "says 3 blocks and has tensors of 4"),
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


def patch(path: Path, key: str, value: bytes) -> None:
    """Overwrite a number of four bytes."""
    offset = GGUFFile(path).header.value_offsets[key]
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 4] = value
    path.write_bytes(raw)


def natural(value: int) -> bytes:
    return struct.pack("<I", value)


HOSTILE = {
    "blocks": ("llama.block_count", natural(2**32 - 1), "not a size"),
    "many blocks": ("llama.block_count", natural(2**31 - 1), "2147483647 blocks.*tensors of 3"),
    "no heads": ("llama.attention.head_count", natural(0), "head_count is 0, not a size"),
    "odd heads": ("llama.attention.head_count_kv", natural(3), "4 heads, 3 of k and v"),
    "many heads": ("llama.attention.head_count", natural(64), "in a width of 32"),
    "no width": ("llama.embedding_length", natural(0), "embedding_length is 0"),
    "context": ("llama.context_length", natural(0), "context_length is 0"),
    "experts": ("llama.expert_count", natural(10**9), "does not fit the heads or experts"),
    "used": ("llama.expert_used_count", natural(5), "5 of 4 experts are used"),
    "base": ("llama.rope.freq_base", struct.pack("<f", math.nan), "can be built with"),
    "eps": ("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", -1), "can be built with"),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    write_model(folder / "source", "mixtral")
    reader, plan = open_and_plan(folder / "source")
    write_plain(folder / "m.gguf", reader, plan)
    return folder / "m.gguf"


@pytest.mark.parametrize("case", HOSTILE)
def test_absurd_numbers_are_refused_before_a_model_is_built(
    case: str, mixture: Path, tmp_path: Path
) -> None:
    key, value, message = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(mixture.read_bytes())
    patch(path, key, value)
    with pytest.raises(BadInputError, match=message):
        GGUFSource(path)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.integers(0, 20),
    st.one_of(st.integers(0, 70), st.integers(0, 2**32 - 1)).map(natural),
)
def test_any_number_gives_a_model_or_is_refused(
    mixture: Path, tmp_path: Path, which: int, value: bytes
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(mixture.read_bytes())
    header = GGUFFile(path).header
    numbers = [
        key
        for key, kind in header.value_types.items()
        if key.startswith("llama.") and kind in (ValueType.UINT32, ValueType.FLOAT32)
    ]
    patch(path, numbers[which % len(numbers)], value)
    with contextlib.suppress(BadInputError):
        read_structure(GGUFSource(path))


def test_a_part_of_a_model_is_refused(mixture: Path, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInputError, match="one of 3 files"):
        GGUFSource(tmp_path / "part.gguf")


@pytest.fixture(scope="module")
def wide_plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FilePlan]:
    """Plans of models whose rows hold whole blocks of 256."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "head_dim": 64,
    }
    gemma = {"layer_types": ["full_attention"], "query_pre_attn_scalar": 64}
    plans = {}
    for name in ("llama3_biased", "mixtral", "gemma3"):
        own = gemma if name == "gemma3" else {}
        folder = tmp_path_factory.mktemp(name)
        tiny_models.build_model(CONFIGS[name](**sizes, **own)).save_pretrained(folder)
        plans[name] = open_and_plan(folder)[1]
    return plans


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ4_NL", "F16"])
@pytest.mark.parametrize("name", ["llama3_biased", "mixtral", "gemma3"])
def test_blocks_read_back_as_the_gguf_package_reads_them(
    name: str, kind: str, wide_plans: dict[str, FilePlan], tmp_path: Path
) -> None:
    plan = wide_plans[name]
    write_random_blocks(tmp_path / "m.gguf", plan, kind)
    source = GGUFSource(tmp_path / "m.gguf")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    wholes = {
        key: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for key, tensor in stored.items()
    }
    planned = {tensor.gguf_name: tensor for tensor in plan.tensors}
    assert bool(source.quantized_modules) == (kind != "F16")
    for module in source.quantized_modules:
        assert source.scheme_of(module).name == kind
    for hf_name in source.names:
        gguf_name = source.gguf_name(hf_name)
        expert = int(hf_name.split("experts.")[1].split(".")[0]) if "experts." in hf_name else 0
        wanted = planned[gguf_name].transform.invert(wholes[gguf_name], expert)
        assert torch.equal(source.read(hf_name), wanted.reshape(source.info(hf_name).shape))


def write_random_blocks(path: Path, plan: FilePlan, kind: str) -> None:
    """A planned file whose matrices are blocks of random codes with scales of 0.5."""
    entries = [
        TensorEntry(t.gguf_name, GGML_TYPES[kind if t.is_matrix else "F32"], t.shape)
        for t in plan.tensors
    ]
    half = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)

    def packed(entry: TensorEntry) -> torch.Tensor:
        kind = entry.type
        if kind.is_plain:
            return pack_plain(torch.randn(entry.shape), kind)
        rows = torch.randint(256, (*entry.shape[:-1], kind.row_bytes(entry.shape[-1])))
        blocks = rows.to(torch.uint8).view(-1, kind.block_bytes)
        # Wherever a type has its scale and minimum, they are finite.
        for offset in (0, 2, kind.block_bytes - 2):
            blocks[:, offset : offset + 2] = half
        return blocks.view(rows.shape)

    write_gguf(path, plan.architecture, plan.metadata, entries, packed)
