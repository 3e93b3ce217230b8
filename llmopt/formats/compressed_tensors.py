"""compressed-tensors' ``pack-quantized``: what transformers and vLLM open without conversion.

For a linear layer ``m`` of ``(out, in)`` weights: ``m.weight_packed (out, ceil(in * bits / 32))
int32``, ``m.weight_scale (out, groups)``, ``m.weight_shape (2,) int64``; asymmetric schemes add
``m.weight_zero_point (ceil(out * bits / 32), groups) int32``, packed along ``out``; schemes that
group by activation order add ``m.weight_g_idx (in,) int32``. The library holds signed codes and
adds half the range before it packs, so what lies on disk are our unsigned codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.formats.bitstream import pack_rows, unpack_rows
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import INT_BITS, ActivationOrder, IntBits, Scheme

_LEAD = "weight_packed"
_PARTS = (_LEAD, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_ORDERS: dict[ActivationOrder, str | None] = {"none": None, "weight": "weight", "group": "group"}


class CompressedTensors:
    """The ``pack-quantized`` format."""

    name = "compressed-tensors"

    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot hold ``scheme``, or ``None`` if it can."""
        if scheme.activation_order == "group" and scheme.group_size is None:
            return (
                "compressed-tensors has no activation order by group with per-channel scales: "
                "there is one group only"
            )
        return None

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
            BadInputError: if the parts do not have the shapes that ``scheme`` gives them.
        """
        rows, columns = self.weight_shape(module, read)
        groups = columns // scheme.columns_per_group(columns)
        packed = read(f"{module}.weight_packed")
        scales = read(f"{module}.weight_scale")
        _expect(module, "weight_packed", packed, (rows, _words(columns, scheme.bits)))
        _expect(module, "weight_scale", scales, (rows, groups))
        zero_points = group_index = None
        if not scheme.symmetric:
            words = read(f"{module}.weight_zero_point")
            _expect(module, "weight_zero_point", words, (_words(rows, scheme.bits), groups))
            zero_points = unpack_rows(words.t(), scheme.bits, rows).t()
            zero_points = zero_points.clone(memory_format=torch.contiguous_format)
        if scheme.activation_order == "group":
            group_index = read(f"{module}.weight_g_idx")
            _expect(module, "weight_g_idx", group_index, (columns,))
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

    def weight_shape(self, module: str, read: Callable[[str], Tensor]) -> tuple[int, int]:
        """Logical ``(out, in)`` of a packed weight."""
        shape = read(f"{module}.weight_shape")
        _expect(module, "weight_shape", shape, (2,))
        rows, columns = shape.tolist()
        return int(rows), int(columns)

    def config(self, schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, JsonValue]:
        """``quantization_config``; several schemes give several groups with explicit targets.

        Raises:
            BadInputError: if no layer is quantized, or one is quantized and ignored.
        """
        if not schemes:
            raise BadInputError(
                "no linear layer would be quantized", "let the ignore list leave something"
            )
        if both := sorted(set(schemes) & set(ignored)):
            raise BadInputError(
                f"{both[0]} is both quantized and ignored", "name it in one place only"
            )
        targets: dict[Scheme, list[JsonValue]] = {}
        for module, scheme in schemes.items():
            targets.setdefault(scheme, []).append(module)
        if len(targets) == 1:
            targets = {scheme: ["Linear"] for scheme in targets}
        groups: dict[str, JsonValue] = {
            f"group_{index}": {
                "targets": names,
                "format": "pack-quantized",
                "weights": _weights_section(scheme),
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

    def schemes(self, config: Mapping[str, JsonValue]) -> CompressedTensorsSchemes:
        """Which scheme ``config`` gives to which module.

        Raises:
            BadInputError: if it is another method or format, or holds what llmopt does not read.
        """
        if config.get("quant_method") != "compressed-tensors":
            raise BadInputError(
                f"quantization method {config.get('quant_method')!r} is not compressed-tensors",
                "give a directory that llmopt wrote",
            )
        found: list[tuple[str, Scheme]] = []
        for name, group in cast(dict[str, dict[str, JsonValue]], config["config_groups"]).items():
            layout = group.get("format") or config.get("format")
            if layout != "pack-quantized" or group.get("input_activations"):
                raise BadInputError(
                    f"compressed-tensors {name} is {layout} with input activations "
                    f"{group.get('input_activations')}",
                    "llmopt reads weight-only pack-quantized checkpoints",
                )
            scheme = _read_weights_section(name, cast(dict[str, JsonValue], group["weights"]))
            found += [(target, scheme) for target in cast(list[str], group["targets"])]
        return CompressedTensorsSchemes(
            tuple(found), tuple(cast(list[str], config.get("ignore") or []))
        )


@dataclass(frozen=True, slots=True)
class CompressedTensorsSchemes:
    """Targets and ignored names of a config, looked up as the compressed-tensors library does.

    Attributes:
        targets: ``(target, scheme)``; a target is a module name, ``re:`` and a pattern that is
            matched from the name's beginning, or ``Linear``.
        ignored: module names or ``re:`` patterns.
    """

    targets: tuple[tuple[str, Scheme], ...]
    ignored: tuple[str, ...]

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer: exact names first, then patterns, then the class."""
        if any(_matches(target, module) for target in self.ignored):
            return None
        exact = [scheme for target, scheme in self.targets if target == module]
        pattern = [scheme for target, scheme in self.targets if _matches(target, module)]
        linear = [scheme for target, scheme in self.targets if target == "Linear"]
        return next(iter(exact + pattern + linear), None)


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _weights_section(scheme: Scheme) -> dict[str, JsonValue]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": _ORDERS[scheme.activation_order],
        "block_structure": None,
        "observer": "minmax",
    }


def _read_weights_section(name: str, weights: Mapping[str, JsonValue]) -> Scheme:
    bits, strategy, order = weights["num_bits"], weights["strategy"], weights.get("actorder")
    orders = {stored: ours for ours, stored in _ORDERS.items()} | {
        "static": "weight",
        "dynamic": "group",
        False: "none",
    }
    if (
        weights["type"] != "int"
        or bits not in INT_BITS
        or strategy not in ("group", "channel")
        or order not in orders
    ):
        raise BadInputError(
            f"compressed-tensors {name}: {bits}-bit {weights['type']}, {strategy}, actorder "
            f"{order} is not a scheme of llmopt",
            f"llmopt reads integer weights of {INT_BITS} bits, by group or channel",
        )
    return Scheme(
        bits=cast(IntBits, bits),
        group_size=cast(int, weights["group_size"]) if strategy == "group" else None,
        symmetric=bool(weights["symmetric"]),
        activation_order=cast(ActivationOrder, orders[order]),
    )


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _expect(module: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise BadInputError(
            f"{module}.{part} has shape {tuple(tensor.shape)}, expected {shape}",
            "the checkpoint is damaged or its quantization_config is not its own",
        )
