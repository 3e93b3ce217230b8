"""A checkpoint as plain rounding would leave it: the yardstick of the gate's relative criterion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from llmopt.checkpoint.tensor_source import TensorInfo, TensorSource
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGMLType
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme


class RoundedSource:
    """``source`` with some weights rounded to nearest on reading, nothing written.

    Args:
        source: the unquantized checkpoint.
        schemes: by tensor name in ``source`` (``....q_proj.weight``).
    """

    def __init__(self, source: TensorSource, schemes: Mapping[str, Scheme | GGMLType]) -> None:
        self._source = source
        self._schemes = schemes

    @property
    def names(self) -> tuple[str, ...]:
        """As the source's."""
        return self._source.names

    def info(self, name: str) -> TensorInfo:
        """As the source's."""
        return self._source.info(name)

    def read(self, name: str) -> Tensor:
        """The tensor; a rounded weight as float32."""
        if name not in self._schemes:
            return self._source.read(name)
        return self.read_rows(name, slice(None))

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a rounded weight, as float32; no scheme lets rows depend on each other."""
        weight = self._source.read(name)[rows]
        scheme = self._schemes[name]
        if isinstance(scheme, GGMLType):  # as llama.cpp does without an importance matrix
            return quantize_blocks(weight, scheme, search="compatible").dequantize()
        scheme = replace(scheme, activation_order="none")
        return rtn(weight, scheme, scale_dtype=weight.dtype).dequantize()
