from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.errors import BadInputError, ExitCode


def refusal(path: Path) -> str:
    with pytest.raises(BadInputError) as caught:
        open_checkpoint(path)
    assert caught.value.remedy and caught.value.exit_code is ExitCode.BAD_INPUT
    return caught.value.what


def edit_index(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def resident_bytes(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{kind}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def sparse_embedding(path: Path, num_rows: int, write_raw: Callable[..., Path]) -> Path:
    """A checkpoint of one (num_rows, 2048) bf16 tensor whose bytes are a hole in the file."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    shape, num_bytes = [num_rows, 2048], num_rows * 4096
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, num_bytes]}
    write_raw(path / "model.safetensors", {"embed": entry}, num_bytes)
    return path


def test_reads_what_the_reference_reader_reads(two_shards: Path) -> None:
    reader = open_checkpoint(two_shards)
    assert reader.config == {"model_type": "llama"} and reader.path == two_shards
    expected: dict[str, torch.Tensor] = {}
    for file in sorted(two_shards.glob("*.safetensors")):
        expected |= load_file(file)
    assert set(reader.names) == set(expected) and reader.names[-1] == "c"
    assert reader.shards["model-00002-of-00002.safetensors"] == ("c",)
    for name, tensor in expected.items():
        info = reader.info(name)
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert (info.num_bytes, info.num_parameters) == (tensor.nbytes, tensor.numel())
        assert torch.equal(reader.read(name), tensor)
    assert reader.info("c").file == two_shards / "model-00002-of-00002.safetensors"
    with pytest.raises(KeyError):
        reader.info("nothing")


def test_tensors_off_their_alignment_empty_and_scalar(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [1, 1]},
        "odd": {"dtype": "F32", "shape": [1, 3], "data_offsets": [1, 13]},
    }
    path = write_raw(tmp_path / "model.safetensors", header, 13)
    with path.open("r+b") as file:
        file.seek(-12, os.SEEK_END)
        file.write(torch.tensor([1.0, -2.0, 3.5]).numpy().tobytes())
    (tmp_path / "config.json").write_text("{}")
    reader = open_checkpoint(tmp_path)
    assert torch.equal(reader.read("odd"), torch.tensor([[1.0, -2.0, 3.5]]))
    assert reader.read("empty").shape == (0, 3) and reader.read("byte").item() == 0


def test_a_row_of_an_embedding_costs_its_pages_and_no_anonymous_memory(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    reader = open_checkpoint(sparse_embedding(tmp_path / "m", 1 << 16, write_raw))  # 256 MiB
    anonymous, mapped = resident_bytes("RssAnon"), resident_bytes("RssFile")
    embedding = reader.read("embed")
    rows = embedding[[3, 40_001]]
    assert rows.shape == (2, 2048)
    assert resident_bytes("RssFile") - mapped < 16 << 20
    for begin in range(0, 1 << 16, 1 << 12):
        assert embedding[begin : begin + (1 << 12)].amax() == 0
    assert resident_bytes("RssAnon") - anonymous < 24 << 20


def test_a_shard_larger_than_the_machines_memory_opens(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    memory = sum(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith(("MemTotal:", "SwapTotal:"))
    )
    num_rows = 2 * memory // 4096
    reader = open_checkpoint(sparse_embedding(tmp_path / "m", num_rows, write_raw))
    assert reader.read("embed")[num_rows - 1].sum() == 0


def test_writing_into_a_tensor_never_reaches_the_source(two_shards: Path) -> None:
    before = [file.read_bytes() for file in sorted(two_shards.iterdir())]
    open_checkpoint(two_shards).read("a").fill_(9)
    assert [file.read_bytes() for file in sorted(two_shards.iterdir())] == before


def test_no_directory_and_no_config(tmp_path: Path, two_shards: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(two_shards / "config.json")
    (two_shards / "config.json").write_text("{")
    assert "not JSON" in refusal(two_shards)
    (two_shards / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(two_shards)
    (two_shards / "config.json").unlink()
    assert "no config.json" in refusal(two_shards)
    (two_shards / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(two_shards)


def test_a_missing_shard_is_named(two_shards: Path) -> None:
    (two_shards / "model-00002-of-00002.safetensors").unlink()
    what = refusal(two_shards)
    assert "1 of 2 shards" in what and "model-00002-of-00002.safetensors" in what


@pytest.mark.parametrize("lost_bytes", [1, 11, 100])
def test_a_truncated_shard_is_named(lost_bytes: int, two_shards: Path) -> None:
    shard = two_shards / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - lost_bytes)
    what = refusal(two_shards)
    assert "truncated" in what and str(shard) in what


def test_an_index_that_names_an_absent_tensor(two_shards: Path) -> None:
    edit_index(two_shards, lambda m: m.update(ghost="model-00001-of-00002.safetensors"))
    assert "names tensors that no shard holds: ghost" in refusal(two_shards)


def test_an_index_that_lacks_or_misplaces_a_tensor(two_shards: Path) -> None:
    edit_index(two_shards, lambda m: m.pop("a"))
    edit_index(two_shards, lambda m: m.update(b="model-00002-of-00002.safetensors"))
    what = refusal(two_shards)
    assert "lacks tensors that its shards hold: a" in what
    assert "b (model-00002-of-00002.safetensors, found in model-00001-of-00002.safetens" in what


def test_a_tensor_in_two_shards(two_shards: Path) -> None:
    save_file(
        {"c": torch.ones(2), "a": torch.ones(2)}, two_shards / "model-00002-of-00002.safetensors"
    )
    assert "in two shards: a (model-00001" in refusal(two_shards)


@pytest.mark.parametrize("place", ["../x.safetensors", "/x", "..", "", "sub/x", 3, None])
def test_an_index_that_points_out_of_its_directory(place: object, two_shards: Path) -> None:
    edit_index(two_shards, lambda m: m.update(a=place))
    assert "no file beside it" in refusal(two_shards)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_weight_map(content: str, two_shards: Path) -> None:
    (two_shards / "model.safetensors.index.json").write_text(content)
    assert "no weight_map" in refusal(two_shards)


def test_shards_without_an_index_and_two_checkpoints(two_shards: Path) -> None:
    save_file({"a": torch.ones(2)}, two_shards / "model.safetensors")
    assert "two checkpoints" in refusal(two_shards)
    (two_shards / "model.safetensors").unlink()
    (two_shards / "model.safetensors.index.json").unlink()
    assert "only model-00001-of-00002.safetensors" in refusal(two_shards)


def test_weights_that_no_index_names_are_not_of_the_checkpoint(two_shards: Path) -> None:
    save_file({"a": torch.ones(2)}, two_shards / "consolidated.safetensors")
    assert set(open_checkpoint(two_shards).names) == {"a", "b", "c", "d"}


def test_pickles_and_empty_directories(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no safetensors weights" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights only (pytorch_model.bin)" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(file: str, two_shards: Path) -> None:
    (two_shards / file).write_text('{"auto_map": {"AutoConfig": "x.Y"}}')
    assert "remote code" in refusal(two_shards) and file in refusal(two_shards)


@pytest.mark.parametrize(
    ("architecture", "code", "refused"),
    [
        ("Phi3ForCausalLM", "modeling_phi3.Phi3ForCausalLM", False),
        ("Phi3ForCausalLM", "modeling_phi3.MineForCausalLM", True),
        ("Phi3SmallForCausalLM", "modeling_phi3.Phi3SmallForCausalLM", True),
    ],
)
def test_code_for_a_model_that_transformers_holds_itself_is_not_needed(
    architecture: str, code: str, refused: bool, two_shards: Path
) -> None:
    offered = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": code}
    config = {"model_type": "phi3", "architectures": [architecture], "auto_map": offered}
    (two_shards / "config.json").write_text(json.dumps(config))
    if refused:
        assert "remote code" in refusal(two_shards)
    else:
        assert open_checkpoint(two_shards).config == config


def test_a_checkpoint_without_tensors(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_raw(tmp_path / "model.safetensors", {}, 0)
    assert "holds no tensor" in refusal(tmp_path)
