"""Rotary embeddings: Hugging Face's ``rope_parameters`` as llama.cpp's metadata and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures.tables import Family
from llmopt.formats.gguf.values import TypedValue, float32, string, uint32

_DEFAULT_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True, slots=True)
class Rotary:
    """What a file says of rotary embeddings.

    Attributes:
        metadata: below the architecture's prefix: ``rope.freq_base`` and its like.
        factors: tensors by which frequencies are divided, ``(rotated dimensions / 2,)``.
        notes: what a person should know of it.
    """

    metadata: Mapping[str, TypedValue]
    factors: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()


def plan_rotary(
    family: Family, parameters: Mapping[str, Any], head_size: int, context_length: int
) -> Rotary:
    """Say in llama.cpp's words how positions are rotated.

    Args:
        family: of the model.
        parameters: a config's ``rope_parameters``, as transformers 5 has it.
        head_size: of q and k.
        context_length: the model's own.

    Raises:
        BadInputError: a rotation that llmopt's table or llama.cpp has no word for.
    """
    window: Mapping[str, Any] | None = None
    if "rope_theta" not in parameters:
        window = parameters.get("sliding_attention")
        parameters = parameters["full_attention"]
    kind = str(parameters.get("rope_type", "default"))
    _refuse_unknown(family, kind, parameters)
    rotated = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    metadata = {
        "rope.dimension_count": uint32(rotated),
        "rope.freq_base": float32(float(parameters["rope_theta"])),
    }
    factors: dict[str, tuple[float, ...]] = {}
    notes: tuple[str, ...] = ()
    match kind:
        case "linear":
            metadata["rope.scaling.type"] = string("linear")
            metadata["rope.scaling.factor"] = float32(float(parameters["factor"]))
        case "llama3":
            factors["rope_freqs.weight"] = _llama3_factors(parameters, rotated)
        case "yarn":
            metadata |= _plan_yarn(parameters, context_length)
        case "longrope":
            metadata |= _plan_longrope(parameters, context_length)
            for length in ("long", "short"):
                values = tuple(float(value) for value in parameters[f"{length}_factor"])
                factors[f"rope_factors_{length}.weight"] = values
            notes = (
                "llama.cpp takes the long rotary factors for a context of more than "
                f"{parameters['original_max_position_embeddings']} tokens, however short the text; "
                "transformers goes by the text",
            )
    if window is not None:
        if window.get("rope_type", "default") != "default":
            raise BadInputError(
                f"the blocks with a window have {window['rope_type']} rotary scaling, which "
                f"llama.cpp's {family.architecture} does not compute",
                "write another format",
            )
        metadata["rope.freq_base_swa"] = float32(float(window["rope_theta"]))
    return Rotary(metadata, factors, notes)


def _refuse_unknown(family: Family, kind: str, parameters: Mapping[str, Any]) -> None:
    if kind not in family.rope_types:
        raise BadInputError(
            f"rotary scaling {kind!r} has no equivalent in llama.cpp's {family.architecture}, "
            f"which has {', '.join(sorted(family.rope_types))}",
            "write another format; or, for contexts within the original length, remove the "
            "scaling from config.json",
        )
    if not family.partial_rotary and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadInputError(
            f"{parameters['partial_rotary_factor']:g} of each head is rotated, and llama.cpp's "
            f"{family.architecture} rotates all of it",
            "write another format",
        )


def _llama3_factors(parameters: Mapping[str, Any], rotated: int) -> tuple[float, ...]:
    """Llama 3's scaling as divisors of the frequencies, ``(rotated / 2,)``.

    Long wavelengths are stretched by the factor, short ones kept, those between interpolated
    (``rope_type: llama3`` in transformers' modeling_rope_utils).
    """
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = float(parameters["original_max_position_embeddings"])
    divisors = []
    for index in range(0, rotated, 2):
        wavelength = 2 * math.pi * float(parameters["rope_theta"]) ** (index / rotated)
        turns = original / wavelength
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(factor)
        else:
            share = (turns - low) / (high - low)
            divisors.append(1.0 / ((1.0 - share) / factor + share))
    return tuple(divisors)


def _plan_yarn(parameters: Mapping[str, Any], context_length: int) -> dict[str, TypedValue]:
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or context_length / original)
    for name, default in _DEFAULT_BETAS.items():
        # llama.cpp 0.3.36 has a key for it, and only Grok's loader reads that.
        if float(parameters.get(name) or default) != default:
            raise BadInputError(
                f"YaRN with {name} {parameters[name]}, where llama.cpp always computes with "
                f"{default:g}",
                "write another format",
            )
    if not parameters.get("truncate", True):
        raise BadInputError(
            "YaRN with truncate: false, where llama.cpp always rounds the corrected range",
            "write another format",
        )
    # llama.cpp multiplies what it computes of the factor itself by this.
    own = yarn_magnitude(factor)
    return {
        "rope.scaling.type": string("yarn"),
        "rope.scaling.factor": float32(factor),
        "rope.scaling.original_context_length": uint32(original),
        "rope.scaling.attn_factor": float32(_yarn_attention(parameters, factor) / own),
    }


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """By what YaRN multiplies sines and cosines."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_attention(parameters: Mapping[str, Any], factor: float) -> float:
    """By what sines and cosines are multiplied, as transformers has it."""
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if above and below:
        return yarn_magnitude(factor, float(above)) / yarn_magnitude(factor, float(below))
    return yarn_magnitude(factor)


def _plan_longrope(parameters: Mapping[str, Any], context_length: int) -> dict[str, TypedValue]:
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or context_length / original)
    attention = parameters.get("attention_factor")
    if attention is None:
        grown = factor > 1.0
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
    return {
        "rope.scaling.type": string("longrope"),
        "rope.scaling.original_context_length": uint32(original),
        "rope.scaling.attn_factor": float32(float(attention)),
    }
