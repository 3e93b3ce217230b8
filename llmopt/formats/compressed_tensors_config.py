"""The ``quantization_config`` of compressed-tensors, its library's defaults filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue

from llmopt.errors import BadInputError
from llmopt.quantization.scheme import INT_BITS, ActivationOrder, IntBits, Scheme

_ORDERS: dict[ActivationOrder, str | None] = {"none": None, "weight": "weight", "group": "group"}
_STORED_ORDERS: dict[JsonValue, ActivationOrder] = {
    **{stored: order for order, stored in _ORDERS.items()},
    "static": "weight",
    "dynamic": "group",
    False: "none",
}
_MEND = "mend config.json, or take the model from its maker again"


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


def weights_section(scheme: Scheme) -> dict[str, JsonValue]:
    """A scheme in the words of the config (``QuantizationArgs``)."""
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


def read_config(config: Mapping[str, JsonValue]) -> CompressedTensorsSchemes:
    """Which scheme ``config`` gives to which module.

    Raises:
        BadInputError: if it is another method or format, or holds what llmopt does not read.
    """
    if config.get("quant_method") != "compressed-tensors":
        raise BadInputError(
            f"quantization method {config.get('quant_method')!r} is not compressed-tensors",
            "give a compressed-tensors directory",
        )
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise BadInputError("the compressed-tensors config has no config_groups", _MEND)
    if config.get("transform_config"):
        raise BadInputError(
            "the compressed-tensors config transforms activations (transform_config)",
            "llmopt reads weights alone; take the model without transforms",
        )
    found: list[tuple[str, Scheme]] = []
    for name, group in groups.items():
        targets, scheme = _read_group(name, group, config.get("format"))
        found += [(target, scheme) for target in targets]
    return CompressedTensorsSchemes(tuple(found), _names(config.get("ignore") or [], "ignore"))


def _read_group(
    name: str, group: JsonValue, default_layout: JsonValue
) -> tuple[tuple[str, ...], Scheme]:
    if not isinstance(group, dict):  # `W4A16: [Linear]`, a preset of the library by its name
        raise BadInputError(f"compressed-tensors {name} is not spelled out", _MEND)
    layout = group.get("format") or default_layout
    if layout != "pack-quantized" or group.get("input_activations"):
        raise BadInputError(
            f"compressed-tensors {name} is {layout} with input activations "
            f"{group.get('input_activations')}",
            "llmopt reads weight-only pack-quantized checkpoints",
        )
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise BadInputError(f"compressed-tensors {name} has no weights section", _MEND)
    return _names(group.get("targets"), f"{name}.targets"), _read_weights(name, weights)


def _names(names: JsonValue, where: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInputError(f"compressed-tensors {where} is no list of names", _MEND)
    return tuple(cast(list[str], names))


def _read_weights(name: str, weights: Mapping[str, JsonValue]) -> Scheme:
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    group_size, order = weights.get("group_size"), weights.get("actorder")
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    by_group = whole and cast(int, group_size) > 0
    strategy = weights.get("strategy") or (
        "group" if by_group else "channel" if group_size == -1 else "tensor"
    )
    known_order = isinstance(order, str | bool | None) and order in _STORED_ORDERS
    if (
        kind != "int"
        or bits not in INT_BITS
        or not (strategy == "channel" or (strategy == "group" and by_group))
        or not known_order
    ):
        raise BadInputError(
            f"compressed-tensors {name}: {bits}-bit {kind}, {strategy} {group_size}, actorder "
            f"{order} is not a scheme of llmopt",
            f"llmopt reads integer weights of {INT_BITS} bits, by group or channel",
        )
    return Scheme(
        bits=cast(IntBits, bits),
        group_size=cast(int, group_size) if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        activation_order=_STORED_ORDERS[cast(str, order)],
    )
