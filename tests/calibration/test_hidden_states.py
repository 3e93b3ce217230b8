from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from llmopt.calibration.hidden_states import HiddenStatePair, HiddenStates
from llmopt.errors import BadInputError, StorageError

SHAPES = [(2, 3), (1, 7), (3, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_batches_are_read_back_after_reopening(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "states.bin"
    states = HiddenStates.create(path, SHAPES, 5, dtype)
    batches = [torch.randn(*shape, 5).to(dtype) for shape in SHAPES]
    for index in (2, 0, 1):
        states.write(index, batches[index])
    states.flush()
    assert path.stat().st_size == 16 * 5 * dtype.itemsize
    del states
    again = HiddenStates.open(path, SHAPES, 5, dtype)
    for index, batch in enumerate(batches):
        assert torch.equal(again.read(index), batch)
    flat = torch.cat([batch.reshape(-1, 5) for batch in batches])
    assert torch.equal(again.tokens(4, 12), flat[4:12])


def test_flushed_bytes_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "states.bin"
    states = HiddenStates.create(path, [(1, 2)], 3, torch.float32)
    states.write(0, torch.arange(6.0).view(1, 2, 3))
    states.flush()
    stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    assert stored.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_read_batch_is_a_copy(tmp_path: Path) -> None:
    states = HiddenStates.create(tmp_path / "states.bin", [(1, 2)], 3, torch.float32)
    states.write(0, torch.ones(1, 2, 3))
    states.read(0).zero_()
    states.tokens(0, 2).zero_()
    assert torch.equal(states.read(0), torch.ones(1, 2, 3))


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    HiddenStates.create(tmp_path / "states.bin", SHAPES, 5, torch.float32)
    with pytest.raises(BadInputError, match="hold 320 bytes, not 160"):
        HiddenStates.open(tmp_path / "states.bin", SHAPES, 5, torch.float16)
    with pytest.raises(BadInputError, match="are missing"):
        HiddenStates.open(tmp_path / "absent.bin", SHAPES, 5, torch.float32)


def test_a_full_disk_is_a_storage_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"320 bytes.*the disk is full"):
        HiddenStates.create(tmp_path / "states.bin", SHAPES, 5, torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_failing_second_file_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr(HiddenStates, "__init__", lambda *_: None)
    with pytest.raises(StorageError):
        HiddenStatePair.create(tmp_path, SHAPES, 5, torch.float32)
    assert not (tmp_path / "hidden-odd.bin").exists()


def test_blocks_take_turns_and_never_overwrite_their_inputs(tmp_path: Path) -> None:
    pair = HiddenStatePair.create(tmp_path, [(1, 1)], 2, torch.float32)
    for block in range(4):
        assert pair.inputs(block).path != pair.outputs(block).path
        assert pair.outputs(block).path == pair.inputs(block + 1).path
    pair.even.write(0, torch.full((1, 1, 2), 7.0))
    pair.even.flush()
    assert (
        HiddenStatePair.open(tmp_path, [(1, 1)], 2, torch.float32).inputs(2).read(0)[0, 0, 0] == 7
    )
    pair.remove()
    assert not list(tmp_path.iterdir())
