from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmopt.checkpoint import scan
from llmopt.checkpoint.scan import combined_digest, scan_tensors, tensor_digest
from llmopt.checkpoint.tensor_source import TensorInfo
from llmopt.errors import BadInputError
from llmopt.progress import silent

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


class MemorySource:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.reads: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape), tensor.nbytes, Path("memory"))

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]


def test_digests_are_of_the_bytes_and_each_tensor_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", 4)
    tensors = {
        "half": torch.randn(3, 7, dtype=torch.bfloat16),
        "int": torch.arange(13),
        "bool": torch.tensor([True, False]),
        "complex": torch.ones(3, dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    source = MemorySource(tensors)
    told: list[tuple[int, int]] = []
    digests = scan_tensors(source, lambda _, done, total: told.append((done, total)))
    assert digests == {
        name: hashlib.sha256(bytes(t.reshape(-1).view(torch.uint8).tolist())).hexdigest()
        for name, t in tensors.items()
    }
    assert source.reads == list(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert told[0] == (0, total) and told[-1] == (total, total) and told == sorted(told)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 10, 20])
def test_nan_and_infinity_are_found_wherever_they_lie(
    dtype: torch.dtype, value: float, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", 8)
    bad = torch.zeros(21)
    bad[place:] = value
    tensors = {"good": torch.ones(3), "bad": bad.to(dtype).view(3, 7)}
    with pytest.raises(
        BadInputError, match=rf"1 tensor holds .* bad \(first at flat index {place}\)"
    ):
        scan_tensors(MemorySource(tensors), silent)


def test_all_bad_tensors_are_counted_and_five_are_named() -> None:
    tensors = {f"t{i}": torch.tensor([1.0, float("nan")]) for i in range(7)}
    tensors["complex"] = torch.tensor([complex(0, float("inf"))])
    with pytest.raises(BadInputError) as caught:
        scan_tensors(MemorySource(tensors), silent)
    assert "8 tensors" in caught.value.what and "and 3 more" in caught.value.what
    assert "t4" in caught.value.what and "t5" not in caught.value.what


def test_the_largest_finite_numbers_are_no_infinity() -> None:
    tensors = {
        str(d): torch.tensor([torch.finfo(d).max] * 5, dtype=torch.float64).to(d) for d in FLOATS
    }
    assert len(scan_tensors(MemorySource(tensors), silent)) == len(FLOATS)


def test_tensor_digest_does_not_depend_on_strides() -> None:
    tensor = torch.arange(15.0).view(3, 5)
    assert tensor_digest(tensor) == tensor_digest(tensor.t().contiguous().t())
    assert tensor_digest(tensor) != tensor_digest(tensor.t())
    assert tensor_digest(torch.arange(9)[::4]) == tensor_digest(torch.tensor([0, 4, 8]))


def test_combined_digest_depends_on_names_and_bytes_but_not_on_order() -> None:
    digest = combined_digest({"a": "1", "b": "2"})
    assert digest == combined_digest({"b": "2", "a": "1"})
    others = [{"a": "2", "b": "1"}, {"a": "1"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}]
    assert digest not in {combined_digest(other) for other in others}
