"""A quantized checkpoint, seen as the floating-point checkpoint it came from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.checkpoint.reader import CheckpointReader
from llmopt.checkpoint.tensor_source import TensorInfo
from llmopt.errors import BadInputError
from llmopt.formats import read_format
from llmopt.formats.config_file import quantization_config
from llmopt.formats.kv_cache import CONFIG_KEY, is_cache_scale
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme


class DequantizedSource:
    """A :class:`TensorSource` with the source's names; packed weights are dequantized on reading.

    A weight comes back as float32, the product that :meth:`QuantizedTensor.dequantize` defines;
    what a consumer's own element type rounds is the consumer's. Nothing is kept between reads.

    Attributes:
        config: ``config.json`` without what was written into it: the source's.
        form: the format of the packed weights.
        has_cache_scales: whether scales of an fp8 cache lie beside the weights; they are not among
            the names.

    Args:
        reader: an opened checkpoint with a ``quantization_config``, its own or another tool's.

    Raises:
        BadInputError: if it has none, or one that no format reads; a packed weight without its
            codes, or beside the same weight in 16 bit.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        config = quantization_config(reader)
        if config is None:
            raise BadInputError(
                f"{reader.path} is not quantized: its config.json has no quantization_config",
                "give the directory of a quantized model",
            )
        self._reader = reader
        self.config: Mapping[str, JsonValue] = {
            key: value
            for key, value in reader.config.items()
            if key not in ("quantization_config", "compression_config", CONFIG_KEY)
        }
        self.form = read_format(config)
        self._table = self.form.schemes(config)
        parts = {name: part for name in reader.names if (part := self.form.weight_name(name))}
        # weight name -> (module, the tensor that leads)
        self._modules = {
            f"{module}.weight": (module, name) for name, (module, leads) in parts.items() if leads
        }
        for name, (module, _) in parts.items():
            if f"{module}.weight" not in self._modules:
                raise BadInputError(
                    f"{reader.path} holds {name}, but not the codes that it belongs to",
                    "download the checkpoint again, completely",
                )
        for name in reader.names:
            if name in self._modules:
                raise BadInputError(
                    f"{reader.path} holds {name} twice: as it is, and packed in "
                    f"{self._modules[name][1]}; readers disagree about which is the weight",
                    "remove the one that its maker did not mean, or take the checkpoint again",
                )
        self.has_cache_scales = bool(config.get("kv_cache_scheme"))
        names = (
            f"{parts[name][0]}.weight" if name in parts else name
            for name in reader.names
            if (name not in parts or parts[name][1])
            and not (self.has_cache_scales and is_cache_scale(name))
        )
        self._names = tuple(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The source's tensor names, in file order."""
        return self._names

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """The linear layers whose weights are packed, in file order."""
        return tuple(module for module, _ in self._modules.values())

    def info(self, name: str) -> TensorInfo:
        """What :meth:`read` will give, and the file it comes from."""
        if name not in self._modules:
            return self._reader.info(name)
        module, lead = self._modules[name]
        rows, columns = self.form.weight_shape(module, self._reader.read, self.scheme_of(module))
        return TensorInfo(
            dtype=torch.float32,
            shape=(rows, columns),
            num_bytes=rows * columns * torch.float32.itemsize,
            file=self._reader.info(lead).file,
        )

    def read(self, name: str) -> Tensor:
        """The tensor, dequantized where it is packed."""
        if name not in self._modules:
            return self._reader.read(name)
        return self.read_quantized(self._modules[name][0]).dequantize()

    def read_quantized(self, module: str) -> QuantizedTensor:
        """The packed weight of a linear layer, as codes.

        Raises:
            BadInputError: if the config gives this module no scheme.
        """
        return self.form.unpack(module, self._reader.read, self.scheme_of(module))

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a packed linear layer; raises BadInputError if the config has none."""
        scheme = self._table.scheme_of(module)
        if scheme is None:
            raise BadInputError(
                f"{module} is packed, but quantization_config gives it no scheme",
                "take the config.json that belongs to this checkpoint",
            )
        return scheme
