"""The ``quantization_config`` of GPTQ files, as each of its writers spells it.

GPTQModel has rules for single layers under ``dynamic``: a regular expression, matched from the
name's beginning, after ``+:`` (or nothing) for other values, after ``-:`` for a layer that is not
quantized; the first rule that matches wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from pydantic import JsonValue

from llmopt.errors import BadInputError
from llmopt.formats.config_values import read_pattern, read_truth, read_whole
from llmopt.quantization.scheme import INT_BITS, IntBits, Scheme

CheckpointFormat = Literal["gptq", "gptq_v2"]
CHECKPOINT_FORMATS: tuple[CheckpointFormat, ...] = get_args(CheckpointFormat)

# vLLM looks rules up by the names of the layers that it has fused.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_HEADS = ("lm_head", r"re:.*\.lm_head$")  # `lm_head: false` speaks for them


@dataclass(frozen=True, slots=True)
class GPTQSchemes:
    """A base scheme and rules for single layers.

    Attributes:
        checkpoint_format: the variant of the files.
        base: where no rule matches.
        rules: ``(pattern, scheme)``; ``None`` for a layer that is not quantized.
    """

    checkpoint_format: CheckpointFormat
    base: Scheme
    rules: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer."""
        for pattern, scheme in self.rules:
            if pattern.match(module):
                return scheme
        return self.base


def scheme_keys(scheme: Scheme) -> dict[str, JsonValue]:
    """A scheme in the words of the config; the order in which columns were solved has none."""
    return {
        "bits": scheme.bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "desc_act": scheme.activation_order == "group",
        "sym": scheme.symmetric,
    }


def rules(
    base: Scheme, schemes: Mapping[str, Scheme], ignored: Sequence[str]
) -> dict[str, JsonValue]:
    """``dynamic`` for all that is not ``base``, and for transformers the layers by name.

    Names are module names, or regular expressions after ``re:``.
    """
    kept = [name for name in ignored if name not in _HEADS]
    dynamic: dict[str, JsonValue] = {f"-:{_pattern(name)}": {} for name in kept}
    keys = scheme_keys(base)
    for name, scheme in schemes.items():
        own = scheme_keys(scheme)
        if own != keys:
            dynamic[f"+:{_pattern(name)}"] = own
    found: dict[str, JsonValue] = {"dynamic": dynamic} if dynamic else {}
    if kept:
        # optimum knows no `dynamic`; it takes layers whose name ends with one of these.
        found["modules_in_block_to_quantize"] = [[_literal_end(name) for name in schemes]]
    return found


def _pattern(name: str) -> str:
    """The expression of a rule, which takes vLLM's name of a layer that it fuses as well."""
    pattern = name.removeprefix("re:") if name.startswith("re:") else f"{re.escape(name)}$"
    last = re.search(r"\w+(?=\$$)", pattern)
    if last is None or last[0] not in _FUSED:
        return pattern
    return f"{pattern[: last.start()]}(?:{last[0]}|{_FUSED[last[0]]})$"


def _literal_end(name: str) -> str:
    r"""What every module ends with that a name stands for: `re:.*text.*\.0\.q$` gives `.0.q`.

    Raises:
        BadInputError: an expression that ends with none.
    """
    if not name.startswith("re:"):
        return name
    end = re.search(r"((?:\\\W|[\w-])+)\$$", name)
    if end is None:
        raise BadInputError(
            f"{name} does not say how the names of its layers end",
            "optimum finds layers by that; choose compressed-tensors",
        )
    return re.sub(r"\\(\W)", r"\1", end[1])


def read_config(config: Mapping[str, JsonValue]) -> GPTQSchemes:
    """The schemes of a GPTQ ``quantization_config`` or ``quantize_config.json``.

    Raises:
        BadInputError: another method, variant or packing, or values that are no scheme.
    """
    method = str(config.get("quant_method", "gptq")).lower()
    if method != "gptq":
        raise BadInputError(
            f"quantization method {method!r} is not gptq", "give a directory of GPTQ files"
        )
    if read_truth(config, "is_marlin_format", "the GPTQ config", False):
        raise BadInputError(
            "the GPTQ files are in marlin's layout (is_marlin_format)",
            "take the model in the plain gptq layout",
        )
    pack_dtype = str(config.get("pack_dtype", "int32")).removeprefix("torch.")
    if pack_dtype != "int32":
        raise BadInputError(
            f"GPTQ files packed into {pack_dtype} words", "llmopt reads words of int32"
        )
    base = _read_scheme(config, "the GPTQ config")
    return GPTQSchemes(read_checkpoint_format(config), base, _read_rules(config))


def read_checkpoint_format(config: Mapping[str, JsonValue]) -> CheckpointFormat:
    """The variant that a config declares, under either of its two keys; v1 without a word.

    Raises:
        BadInputError: an unknown one, or two that differ.
    """
    named = {
        key: str(config[key]).lower()
        for key in ("checkpoint_format", "format")
        if config.get(key) is not None
    }
    if len(set(named.values())) > 1:
        words = ", ".join(f"{key} {value}" for key, value in named.items())
        raise BadInputError(
            f"the GPTQ config contradicts itself: {words}", "ask the maker of the file which it is"
        )
    found = next(iter(named.values()), "gptq")
    for known in CHECKPOINT_FORMATS:
        if found == known:
            return known
    raise BadInputError(
        f"GPTQ checkpoint_format {found!r} is not one llmopt reads",
        f"llmopt reads {' and '.join(CHECKPOINT_FORMATS)}",
    )


def _read_scheme(config: Mapping[str, JsonValue], where: str) -> Scheme:
    missing = [key for key in ("bits", "group_size") if key not in config]
    if missing:
        raise BadInputError(
            f"{where} lacks {' and '.join(missing)}", "add what the maker of the file says"
        )
    bits = read_whole(config, "bits", where, 0)
    group_size = read_whole(config, "group_size", where, 0)
    if bits not in INT_BITS or not (group_size == -1 or group_size > 0):
        raise BadInputError(
            f"{where}: {bits} bits in groups of {group_size} is not a scheme of llmopt",
            f"llmopt reads integer weights of {INT_BITS} bits, by group or channel (-1)",
        )
    size = None if group_size == -1 else group_size
    # With one group a row an order of groups means nothing.
    grouped = read_truth(config, "desc_act", where, False) and size is not None
    return Scheme(
        bits=cast(IntBits, bits),
        group_size=size,
        symmetric=read_truth(config, "sym", where, True),
        activation_order="group" if grouped else "none",
    )


def _read_rules(
    config: Mapping[str, JsonValue],
) -> tuple[tuple[re.Pattern[str], Scheme | None], ...]:
    found: list[tuple[re.Pattern[str], Scheme | None]] = []
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise BadInputError("the GPTQ config's dynamic is not a mapping", "mend config.json")
    for rule, changes in dynamic.items():
        negative = rule.startswith("-:")
        where = f"the GPTQ config's rule {rule!r}"
        pattern = read_pattern(rule.removeprefix("-:").removeprefix("+:"), where)
        if negative:
            found.append((pattern, None))
            continue
        if not isinstance(changes, dict):
            raise BadInputError(f"{where} is empty", "mend config.json")
        found.append((pattern, _read_scheme({**config, **changes}, where)))
    return tuple(found)
