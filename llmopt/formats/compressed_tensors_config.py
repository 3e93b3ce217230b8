"""The ``quantization_config`` of compressed-tensors, its library's defaults filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue

from llmopt.errors import BadInputError
from llmopt.formats.config_values import read_names, read_pattern, read_truth, read_whole
from llmopt.formats.kv_cache import check_cache_scheme
from llmopt.quantization.scheme import INT_BITS, ActivationOrder, IntBits, Scheme

_ORDERS: dict[ActivationOrder, str | None] = {"none": None, "weight": "weight", "group": "group"}
_STORED_ORDERS: dict[JsonValue, ActivationOrder] = {
    **{stored: order for order, stored in _ORDERS.items()},
    "static": "weight",
    "dynamic": "group",
    False: "none",
}
_WHERE = "the compressed-tensors config"
# Without these the same weights are another model.
_MORE_THAN_WEIGHTS = {
    "transform_config": "transforms activations",
    "sparsity_config": "stores sparse weights",
}
_MEND = "mend config.json, or take the model from its maker again"


@dataclass(frozen=True, slots=True)
class Target:
    """A module name, or ``re:`` and a pattern that is matched from the name's beginning.

    Attributes:
        name: as the config has it.
        pattern: what follows ``re:``; ``None`` for a plain name.
    """

    name: str
    pattern: re.Pattern[str] | None

    def matches(self, module: str) -> bool:
        """Whether it speaks of the module by its name."""
        if self.pattern is None:
            return self.name == module
        return self.pattern.match(module) is not None


@dataclass(frozen=True, slots=True)
class CompressedTensorsSchemes:
    """Targets and ignored names of a config, looked up as the compressed-tensors library does.

    Attributes:
        targets: ``(target, scheme)``; one named ``Linear`` stands for the class.
        ignored: what is not quantized.
    """

    targets: tuple[tuple[Target, Scheme], ...]
    ignored: tuple[Target, ...]

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer: exact names first, then patterns, then the class."""
        if any(target.matches(module) for target in self.ignored):
            return None
        exact = [scheme for target, scheme in self.targets if target.name == module]
        pattern = [scheme for target, scheme in self.targets if target.matches(module)]
        linear = [scheme for target, scheme in self.targets if target.name == "Linear"]
        return next(iter(exact + pattern + linear), None)


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
    for key, does in _MORE_THAN_WEIGHTS.items():
        section = config.get(key)
        dense = isinstance(section, dict) and section.get("format") == "dense"
        if section and not (key == "sparsity_config" and dense):
            raise BadInputError(
                f"{_WHERE} {does} ({key})",
                "llmopt reads quantized weights alone; take the model without it",
            )
    cache = config.get("kv_cache_scheme")
    if cache is not None:
        if not isinstance(cache, dict):
            raise BadInputError(f"{_WHERE} has kv_cache_scheme {cache!r}", _MEND)
        check_cache_scheme(cache)
    found: list[tuple[Target, Scheme]] = []
    for name, group in groups.items():
        targets, scheme = _read_group(name, group, config.get("format"))
        found += [(target, scheme) for target in targets]
    return CompressedTensorsSchemes(tuple(found), _targets(config, "ignore", _WHERE))


def _read_group(
    name: str, group: JsonValue, default_layout: JsonValue
) -> tuple[tuple[Target, ...], Scheme]:
    if not isinstance(group, dict):  # `W4A16: [Linear]`, a preset of the library by its name
        raise BadInputError(f"compressed-tensors {name} is not spelled out", _MEND)
    layout = group.get("format") or default_layout
    activations = [key for key in ("input_activations", "output_activations") if group.get(key)]
    if layout != "pack-quantized" or activations:
        quantized = f" with quantized {activations[0].replace('_', ' ')}" if activations else ""
        raise BadInputError(
            f"compressed-tensors {name} is {layout}{quantized}",
            "llmopt reads weight-only pack-quantized checkpoints",
        )
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise BadInputError(f"compressed-tensors {name} has no weights section", _MEND)
    if group.get("targets") is None:
        raise BadInputError(f"compressed-tensors {name} has no targets", _MEND)
    return _targets(group, "targets", f"compressed-tensors {name}"), _read_weights(name, weights)


def _targets(config: Mapping[str, JsonValue], key: str, where: str) -> tuple[Target, ...]:
    return tuple(
        Target(name, read_pattern(name[3:], where) if name.startswith("re:") else None)
        for name in read_names(config, key, where)
    )


def _read_weights(name: str, weights: Mapping[str, JsonValue]) -> Scheme:
    where = f"compressed-tensors {name}"
    bits, kind = read_whole(weights, "num_bits", where, 8), weights.get("type", "int")
    order = weights.get("actorder")
    stated = weights.get("group_size") is not None
    group_size = read_whole(weights, "group_size", where, 0) if stated else None
    by_group = group_size is not None and group_size > 0
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
            f"{where}: {bits}-bit {kind}, {strategy} {group_size}, actorder {order} is not a "
            "scheme of llmopt",
            f"llmopt reads integer weights of {INT_BITS} bits, by group or channel",
        )
    return Scheme(
        bits=cast(IntBits, bits),
        group_size=group_size if strategy == "group" else None,
        symmetric=read_truth(weights, "symmetric", where, True),
        activation_order=_STORED_ORDERS[cast(str, order)],
    )
