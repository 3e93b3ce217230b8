"""A quantized checkpoint, seen as the floating-point checkpoint it came from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.checkpoint.reader import CheckpointReader
from llmopt.checkpoint.tensor_source import TensorInfo
from llmopt.errors import BadInputError
from llmopt.formats import FORMATS
from llmopt.formats.base import Format
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme


class DequantizedSource:
    """A :class:`TensorSource` with the source's names; packed weights are dequantized on reading.

    A weight comes back as float32, the product that :meth:`QuantizedTensor.dequantize` defines;
    what a consumer's own element type rounds is the consumer's. Nothing is kept between reads.

    Attributes:
        config: ``config.json`` without its ``quantization_config``: the source's.

    Args:
        reader: an opened checkpoint whose ``config.json`` has a ``quantization_config``.

    Raises:
        BadInputError: if it has none, or one that no format reads.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        config = reader.config.get("quantization_config")
        if not isinstance(config, dict):
            raise BadInputError(
                f"{reader.path} is not quantized: its config.json has no quantization_config",
                "give a directory that llmopt wrote",
            )
        self._reader = reader
        self.config: Mapping[str, JsonValue] = {
            key: value for key, value in reader.config.items() if key != "quantization_config"
        }
        self._format = _find_format(config)
        self._table = self._format.schemes(config)
        self._modules: dict[str, str] = {}  # weight name -> module
        names: list[str] = []
        for name in reader.names:
            part = self._format.weight_name(name)
            if part is None:
                names.append(name)
            elif part[1]:
                names.append(f"{part[0]}.weight")
                self._modules[f"{part[0]}.weight"] = part[0]
        self._names = tuple(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The source's tensor names, in file order."""
        return self._names

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """The linear layers whose weights are packed, in file order."""
        return tuple(self._modules.values())

    def info(self, name: str) -> TensorInfo:
        """What :meth:`read` will give, and the file it comes from."""
        module = self._modules.get(name)
        if module is None:
            return self._reader.info(name)
        scales = self._reader.info(f"{module}.weight_scale")
        rows, columns = self._format.weight_shape(module, self._reader.read)
        return TensorInfo(
            dtype=torch.float32,
            shape=(rows, columns),
            num_bytes=rows * columns * torch.float32.itemsize,
            file=scales.file,
        )

    def read(self, name: str) -> Tensor:
        """The tensor, dequantized where it is packed."""
        module = self._modules.get(name)
        if module is None:
            return self._reader.read(name)
        return self.read_quantized(module).dequantize()

    def read_quantized(self, module: str) -> QuantizedTensor:
        """The packed weight of a linear layer, as codes.

        Raises:
            BadInputError: if the config gives this module no scheme.
        """
        return self._format.unpack(module, self._reader.read, self.scheme_of(module))

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a packed linear layer; raises BadInputError if the config has none."""
        scheme = self._table.scheme_of(module)
        if scheme is None:
            raise BadInputError(
                f"{module} is packed, but quantization_config gives it no scheme",
                "the config.json belongs to another checkpoint",
            )
        return scheme


def _find_format(config: Mapping[str, JsonValue]) -> Format:
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise BadInputError(
            f"quantization method {method!r} is not one llmopt reads",
            f"llmopt reads {', '.join(FORMATS)}",
        )
    return FORMATS[method]
