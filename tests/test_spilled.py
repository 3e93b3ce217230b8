from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmopt import spilled as spilled_module
from llmopt.checkpoint.tensor_source import TensorInfo
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES
from llmopt.rounded import RoundedSource
from llmopt.spilled import SpilledSource


class Counted:
    """A source that counts how often it is asked."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(5, 64, generator=generator) for name in ("table", "other")
        }
        self.reads: list[str] = []
        self.rows_read: list[int] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape), tensor.nbytes, Path(name))

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]

    def read_rows(self, rows: slice) -> Tensor:
        """Of the table."""
        found = self.tensors["table"][rows]
        self.rows_read.append(len(found))
        return found


def test_a_table_is_read_once_some_rows_at_a_time_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilled_module, "_ROW_ELEMENTS", 2 * 64)
    source = Counted()
    spilled = SpilledSource(source, {"table": source.read_rows}, tmp_path)
    for _ in range(3):
        assert torch.equal(spilled.read("table"), source.tensors["table"])
        assert torch.equal(spilled.read("other"), source.tensors["other"])
    assert source.rows_read == [2, 2, 1]
    assert source.reads == ["other"] * 3
    assert not list(tmp_path.iterdir())
    assert spilled.names == source.names and spilled.info("table") == source.info("table")


def test_the_yardstick_of_a_ggml_type_is_llama_cpps_rounding_without_importance() -> None:
    source = Counted()
    rounded = RoundedSource(source, {"table": GGML_TYPES["Q5_1"]})
    weight = source.tensors["table"]
    expected = quantize_blocks(weight, GGML_TYPES["Q5_1"], search="compatible").dequantize()
    assert torch.equal(rounded.read("table"), expected) and not torch.equal(expected, weight)
    assert rounded.read("other") is source.tensors["other"]
