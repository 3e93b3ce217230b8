from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmopt.checkpoint import durable, shards
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.safetensors_header import DTYPES
from llmopt.checkpoint.shards import shard_file_name, write_index, write_shard
from llmopt.errors import StorageError


def test_the_reference_reader_reads_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 10)
    tensors = {f"x.{n}": torch.randn(3, 7).abs().to(dtype) for n, dtype in DTYPES.items()}
    tensors |= {
        "é": torch.arange(3),
        "transposed": torch.arange(15.0).view(3, 5).t(),
        "strided": torch.arange(20)[::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    record = write_shard(tmp_path / "model.safetensors", tensors)
    content = (tmp_path / "model.safetensors").read_bytes()
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        same = tensor.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), same), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert record.num_bytes == len(content) and record.file == "model.safetensors"
    assert record.num_tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).names == record.names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_bytes_do_not_depend_on_the_order_of_the_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.ones(5, dtype=torch.int8), "c": torch.zeros(2)}
    first = write_shard(tmp_path / "1", tensors)
    second = write_shard(tmp_path / "2", dict(reversed(tensors.items())))
    assert first.sha256 == second.sha256 and first.names == second.names == ("b", "c", "a")


def test_shards_and_index_make_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    records = [
        write_shard(tmp_path / shard_file_name(i, 3), {f"t{i}": torch.full((i + 1,), i)})
        for i in range(3)
    ]
    write_index(tmp_path, records)
    assert [r.file for r in records][0] == "model-00001-of-00003.safetensors"
    reader = open_checkpoint(tmp_path)
    assert [reader.read(name).tolist() for name in reader.names] == [[0], [1, 1], [2, 2, 2]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6 * 8}


def test_a_single_shard_needs_no_index(tmp_path: Path) -> None:
    record = write_shard(tmp_path / shard_file_name(0, 1), {"t": torch.ones(2)})
    write_index(tmp_path, [record])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(small_disk: Path) -> None:
    path = small_disk / "model.safetensors"
    write_shard(path, {"small": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(StorageError, match=f"cannot write {path}") as caught:
        write_shard(path, {"big": torch.ones(1 << 20)})
    assert "free space" in caught.value.remedy or "size limit" in caught.value.remedy
    assert [file.name for file in small_disk.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        write_shard(tmp_path / "nowhere" / "x", {"t": torch.ones(1)})


def test_the_order_of_durable_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rename only after the bytes are on disk; the directory after the rename."""
    steps: list[str] = []
    fsync, replace = durable.os.fsync, durable.os.replace

    def traced_fsync(descriptor: int) -> None:
        steps.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def traced_replace(old: Path, new: Path) -> None:
        steps.append(f"replace {new.name}")
        replace(old, new)

    monkeypatch.setattr(durable.os, "fsync", traced_fsync)
    monkeypatch.setattr(durable.os, "replace", traced_replace)
    durable.write_bytes(tmp_path / "x", b"content")
    assert steps == ["fsync .x.llmopt-tmp", "replace x", f"fsync {tmp_path.name}"]


def test_kill_at_any_step_of_a_shard_write_leaves_the_old_file_or_the_new(
    tmp_path: Path, run_and_kill: Callable[..., bool]
) -> None:
    path = tmp_path / "model.safetensors"
    new = {"t": torch.full((5000,), 2.0)}
    write_shard(tmp_path / "new", new)
    contents = {(tmp_path / "new").read_bytes()}
    for step in range(1, 100):
        write_shard(path, {"t": torch.ones(3)})
        contents.add(path.read_bytes())
        killed = run_and_kill(step, tmp_path, lambda: write_shard(path, new), power_cut=True)
        assert path.read_bytes() in contents
        if not killed:
            assert load_file(path)["t"].shape == (5000,) and step > 4
            return
    raise AssertionError("the write did not come to its end")
