"""A file's metadata as the Hugging Face config of a model that computes the same."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures.metadata import (
    attention_scalar,
    default_windows,
    rotates,
)
from llmopt.formats.gguf.architectures.rotary import yarn_magnitude
from llmopt.formats.gguf.architectures.tables import FAMILIES, Family
from llmopt.formats.gguf.values import PlainValue

_SPECIAL_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}


class MetadataReader:
    """A file's values under one architecture's prefix, each checked for its type.

    Attributes:
        place: the file, for messages.

    Args:
        metadata: all values.
        place: the file, for messages.
        architecture: the prefix.
    """

    def __init__(self, metadata: Mapping[str, PlainValue], place: str, architecture: str) -> None:
        self._metadata = metadata
        self.place = place
        self._architecture = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; of a list with one for each block, the one that all are."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "one whole number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number that counts something: above zero, within 31 bits."""
        value = self.integer(key, default)
        if not 0 < value < 1 << 31:
            raise self._wrong(key, value, "a size")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, the shortest decimal that is the stored float32."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        shortest = float(str(np.float32(value)))
        if not math.isfinite(shortest) or shortest < 0:
            raise self._wrong(key, value, "a number that a model can be built with")
        return shortest

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def flags(self, key: str, count: int) -> tuple[bool, ...] | None:
        """One switch for each block; None if the file says none."""
        value = self._metadata.get(f"{self._architecture}.{key}")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) < count:
            raise self._wrong(key, value, f"a list of {count}")
        return tuple(bool(flag) for flag in value[:count])

    def has(self, key: str) -> bool:
        """Whether the file says anything."""
        return f"{self._architecture}.{key}" in self._metadata

    def _get(self, key: str, default: PlainValue | None) -> PlainValue:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if value is None:
            raise BadInputError(
                f"{self.place} does not say {self._architecture}.{key}",
                "convert the model anew; llama.cpp needs it as well",
            )
        return value

    def _wrong(self, key: str, value: PlainValue, wanted: str) -> BadInputError:
        return BadInputError(
            f"{self.place}: {self._architecture}.{key} is {str(value)[:80]}, not {wanted}",
            "convert the model anew",
        )


def family_of_file(metadata: Mapping[str, PlainValue], place: str) -> Family:
    """The family of a file's model.

    Raises:
        BadInputError: llmopt's table has none.
    """
    architecture = metadata.get("general.architecture")
    experts = metadata.get(f"{architecture}.expert_count", 0)
    for family in FAMILIES:
        if family.architecture == architecture and family.has_experts == bool(experts):
            return family
    known = dict.fromkeys(family.architecture for family in FAMILIES)
    raise BadInputError(
        f"{place} is a model of the architecture {architecture!r}, which llmopt does not know",
        f"llmopt reads {', '.join(known)}",
    )


def rebuild_config(
    family: Family,
    metadata: Mapping[str, PlainValue],
    place: str,
    tensors: Collection[str],
    vocabulary: int,
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """A ``config.json`` from which transformers builds a model that computes the file's.

    Names that llama.cpp has no word for (dropout, initialisation) are left to their defaults.

    Args:
        family: of the model.
        metadata: the file's.
        place: the file, for messages.
        tensors: names of the file's tensors.
        vocabulary: rows of the embedding.
        factors: values of the rotary tensors by name, as far as the file has them.

    Raises:
        BadInputError: a value that is missing, of the wrong type, or that differs between blocks.
    """
    read = MetadataReader(metadata, place, family.architecture)
    blocks, hidden = read.size("block_count"), read.size("embedding_length")
    _check_blocks(tensors, blocks, place)
    heads = read.size("attention.head_count")
    shared = read.size("attention.head_count_kv", heads)
    if hidden < heads or heads % shared:
        raise BadInputError(
            f"{place} says {heads} heads, {shared} of k and v, in a width of {hidden}",
            "convert the model anew",
        )
    size = read.size("attention.key_length", hidden // heads)
    config: dict[str, Any] = {
        "model_type": family.model_types[0],
        "architectures": [family.model_class],
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": size,
        "intermediate_size": read.size("feed_forward_length"),
        "max_position_embeddings": read.size("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "pad_token_id": None,
        "rope_parameters": _rope_parameters(family, read, size, factors),
        **_biases(family, tensors),
        **_special_tokens(metadata),
    }
    if not family.free_head_size:
        del config["head_dim"]
    if family.has_experts:
        config |= _experts(family, read)
    if family.has_windows:
        scalar = attention_scalar(family, blocks, hidden, heads, size)
        config |= {"query_pre_attn_scalar": scalar, **_windows(family, read, blocks)}
    if family.no_rope_every:
        config["no_rope_layers"] = rotates(family, blocks)
    return config


def _check_blocks(tensors: Collection[str], blocks: int, place: str) -> None:
    """Hold the count against the tensors, before a model of so many blocks is built."""
    found = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(found) != blocks:
        raise BadInputError(
            f"{place} says {blocks} blocks and has tensors of {len(found)}",
            "download the file again, or convert the model anew",
        )


def _biases(family: Family, tensors: Collection[str]) -> dict[str, bool]:
    if not family.biases:
        return {}
    return {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _special_tokens(metadata: Mapping[str, PlainValue]) -> dict[str, PlainValue | None]:
    found = {name: metadata.get(key) for name, key in _SPECIAL_TOKENS.items()}
    return {name: value if type(value) is int else None for name, value in found.items()}


def _experts(family: Family, read: MetadataReader) -> dict[str, Any]:
    count, used = read.size("expert_count"), read.size("expert_used_count")
    if used > count:
        raise BadInputError(
            f"{read.place} says that {used} of {count} experts are used", "convert the model anew"
        )
    found = {
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "norm_topk_prob": True,
    }
    if read.has("expert_feed_forward_length"):
        found["moe_intermediate_size"] = read.size("expert_feed_forward_length")
        found["num_experts"] = found.pop("num_local_experts")
    return found


def _windows(family: Family, read: MetadataReader, blocks: int) -> dict[str, Any]:
    """Windows and caps of Gemma's families, with the defaults of llama.cpp's loaders."""
    is_second = family.tied_head
    flags = read.flags("attention.sliding_window_pattern", blocks)
    window = read.integer("attention.sliding_window", 4096 if is_second else 0)
    if flags is None:
        flags = default_windows(family, blocks) if window else (False,) * blocks
    found: dict[str, Any] = {
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in flags],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if is_second:
        found["attn_logit_softcapping"] = read.number("attn_logit_softcapping", 50.0)
        found["final_logit_softcapping"] = read.number("final_logit_softcapping", 30.0)
    elif read.number("final_logit_softcapping", 0.0):
        found["final_logit_softcapping"] = read.number("final_logit_softcapping")
    return found


def _rope_parameters(
    family: Family, read: MetadataReader, head_size: int, factors: Mapping[str, list[float]]
) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": read.number("rope.freq_base", 10000.0),
    }
    rotated = read.size("rope.dimension_count", head_size)
    if family.partial_rotary:
        parameters["partial_rotary_factor"] = rotated / head_size
    kind = read.text("rope.scaling.type", "none")
    factor = read.number("rope.scaling.factor", 1.0)
    original = read.size("rope.scaling.original_context_length", read.size("context_length"))
    attention = read.number("rope.scaling.attn_factor", 1.0)
    if factors:
        # transformers divides frequencies by any factors as "longrope"; that llama3's are computed
        # from four numbers, a file does not tell.
        both = factors.get("rope_freqs.weight")
        parameters |= {
            "rope_type": "longrope",
            "long_factor": both or factors.get("rope_factors_long.weight"),
            "short_factor": both or factors.get("rope_factors_short.weight"),
            "original_max_position_embeddings": original,
            "attention_factor": attention,
            "factor": 1.0,
        }
    elif kind == "linear" and factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        parameters |= _yarn(factor, original, attention)
    if family.architecture != "gemma3":
        return parameters
    base = read.number("rope.freq_base_swa", 10000.0)
    return {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": base},
    }


def _yarn(factor: float, original: int, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention * yarn_magnitude(factor),
    }
