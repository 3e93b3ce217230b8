"""compressed-tensors' ``pack-quantized``: what transformers and vLLM open without conversion.

For a linear layer ``m`` of ``(out, in)`` weights: ``m.weight_packed (out, ceil(in * bits / 32))
int32``, ``m.weight_scale (out, groups)``, ``m.weight_shape (2,) int64``; asymmetric schemes add
``m.weight_zero_point (ceil(out * bits / 32), groups) int32``, packed along ``out``; schemes that
group by activation order add ``m.weight_g_idx (in,) int32``. The library holds signed codes and
adds half the range before it packs, so what lies on disk are our unsigned codes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.formats.bitstream import pack_rows, unpack_rows
from llmopt.formats.compressed_tensors_config import (
    CompressedTensorsSchemes,
    read_config,
    weights_section,
)
from llmopt.formats.layer_names import check_layers
from llmopt.formats.parts import (
    INDICES,
    SCALES,
    WORDS,
    check_group_index,
    check_scales,
    count_groups,
    read_part,
)
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme
from llmopt.quantization.storage import stored_bits_per_weight

_LEAD = "weight_packed"
_PARTS = (_LEAD, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


class CompressedTensors:
    """The ``pack-quantized`` format."""

    name = "compressed-tensors"
    checkpoint_format = None
    takes_patterns = True

    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot hold ``scheme``, or ``None`` if it can."""
        if scheme.activation_order == "group" and scheme.group_size is None:
            return (
                "compressed-tensors has no activation order by group with per-channel scales: "
                "there is one group only"
            )
        return None

    def shape_refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold a weight of ``shape``: it pads words, so any shape will do."""
        del scheme, shape
        return None

    def mixture_refusal(self, schemes: Collection[Scheme]) -> str | None:
        """Why one checkpoint cannot hold all of ``schemes``: it has groups for each."""
        del schemes
        return None

    def bits_per_weight(
        self, scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> float:
        """Stored bits a weight."""
        return stored_bits_per_weight(scheme, shape, scale_dtype)

    def pack(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The checkpoint tensors, by full name, that stand for ``module``'s weight."""
        bits = tensor.scheme.bits
        packed = {
            "weight_packed": pack_rows(tensor.codes, bits),
            "weight_scale": tensor.scales.contiguous(),
            "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zero_points is not None:
            words = pack_rows(tensor.zero_points.t(), bits).t()
            packed["weight_zero_point"] = words.clone(memory_format=torch.contiguous_format)
        if tensor.group_index is not None:
            packed["weight_g_idx"] = tensor.group_index.to(torch.int32)
        return {f"{module}.{part}": value for part, value in packed.items()}

    def unpack(self, module: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedTensor:
        """The inverse of :meth:`pack`.

        Raises:
            BadInputError: if parts are missing, or do not have the element types and shapes that
                ``scheme`` gives them; a group index out of range.
        """
        rows, columns = self.weight_shape(module, read, scheme)
        groups = count_groups(module, scheme, columns)
        words = _words(columns, scheme.bits)
        packed = read_part(module, "weight_packed", read, WORDS, (rows, words))
        scales = read_part(module, "weight_scale", read, SCALES, (rows, groups))
        check_scales(module, scales)
        zero_points = group_index = None
        if not scheme.symmetric:
            shape = (_words(rows, scheme.bits), groups)
            stored = read_part(module, "weight_zero_point", read, WORDS, shape)
            zero_points = unpack_rows(stored.t(), scheme.bits, rows).t()
            zero_points = zero_points.clone(memory_format=torch.contiguous_format)
        if scheme.activation_order == "group":
            stored = read_part(module, "weight_g_idx", read, INDICES, (columns,))
            group_index = check_group_index(module, "weight_g_idx", stored, groups)
        return QuantizedTensor(
            codes=unpack_rows(packed, scheme.bits, columns),
            scales=scales,
            zero_points=zero_points,
            group_index=group_index,
            scheme=scheme,
        )

    def weight_name(self, tensor_name: str) -> tuple[str, bool] | None:
        """``(module, leads)`` if the tensor is part of a packed weight, else ``None``."""
        module, _, part = tensor_name.rpartition(".")
        return (module, part == _LEAD) if part in _PARTS else None

    def weight_shape(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """Logical ``(out, in)`` of a packed weight."""
        del scheme
        shape = read_part(module, "weight_shape", read, INDICES, (2,))
        rows, columns = shape.tolist()
        return int(rows), int(columns)

    def config(self, schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, JsonValue]:
        """``quantization_config``; several schemes give several groups with explicit targets.

        Raises:
            BadInputError: if no layer is quantized, or one is quantized and ignored.
        """
        check_layers(schemes, ignored)
        targets: dict[Scheme, list[JsonValue]] = {}
        for module, scheme in schemes.items():
            targets.setdefault(scheme, []).append(module)
        if len(targets) == 1:
            targets = {scheme: ["Linear"] for scheme in targets}
        groups: dict[str, JsonValue] = {
            f"group_{index}": {
                "targets": names,
                "format": "pack-quantized",
                "weights": weights_section(scheme),
                "input_activations": None,
                "output_activations": None,
            }
            for index, (scheme, names) in enumerate(targets.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }

    def companion_files(
        self, config: Mapping[str, JsonValue]
    ) -> dict[str, Mapping[str, JsonValue]]:
        """Files beside ``config.json``: none."""
        del config
        return {}

    def schemes(self, config: Mapping[str, JsonValue]) -> CompressedTensorsSchemes:
        """Which scheme ``config`` gives to which module.

        Raises:
            BadInputError: if it is another method or format, or holds what llmopt does not read.
        """
        return read_config(config)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)
