"""A text model's config as the metadata that llama.cpp's loader reads, or why it cannot be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures.rotary import plan_rotary
from llmopt.formats.gguf.architectures.tables import FAMILIES, Family
from llmopt.formats.gguf.values import TypedValue, booleans, float32, string, uint32

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS

_OTHER_FORMAT = "write another format, or ask llama.cpp's project for support"


@dataclass(frozen=True, slots=True)
class PlannedMetadata:
    """What a file says of its model.

    Attributes:
        values: typed, under llama.cpp's keys.
        factors: the rotary tensors that belong to it.
        notes: what a person should know of it.
    """

    values: Mapping[str, TypedValue]
    factors: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...]


def find_family(config: PreTrainedConfig) -> Family:
    """The family of a text model.

    Raises:
        BadInputError: llmopt's table has none.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise BadInputError(
        f"llmopt writes no GGUF file of a {config.model_type!r} model",
        f"the text models that it writes as GGUF are {known}",
    )


def plan_metadata(family: Family, config: PreTrainedConfig, vocabulary: int) -> PlannedMetadata:
    """Say all that llama.cpp must know of a model, tokenizer and element types aside.

    Args:
        family: of the model.
        config: the text model's.
        vocabulary: rows of the embedding.

    Raises:
        BadInputError: a value that llama.cpp does not read, or computes otherwise; named.
    """
    head_size = head_size_of(config)
    _refuse_what_is_computed_otherwise(family, config, head_size)
    context, notes = _context_length(family, config)
    rotary = plan_rotary(
        family, config.rope_parameters, head_size, int(config.max_position_embeddings)
    )
    values = {
        "context_length": uint32(context),
        "embedding_length": uint32(config.hidden_size),
        "block_count": uint32(config.num_hidden_layers),
        "feed_forward_length": uint32(config.intermediate_size),
        "vocab_size": uint32(vocabulary),
        "attention.head_count": uint32(config.num_attention_heads),
        "attention.head_count_kv": uint32(config.num_key_value_heads),
        "attention.key_length": uint32(head_size),
        "attention.value_length": uint32(head_size),
        "attention.layer_norm_rms_epsilon": float32(config.rms_norm_eps),
        **rotary.metadata,
        **_window_values(family, config, context),
        **_cap_values(config),
        **(_expert_values(config) if family.has_experts else {}),
    }
    named = {f"{family.architecture}.{key}": value for key, value in values.items()}
    notes = (*notes, *rotary.notes)
    return PlannedMetadata({"general.type": string("model"), **named}, rotary.factors, notes)


def head_size_of(config: PreTrainedConfig) -> int:
    """Width of a query head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def window_flags(config: PreTrainedConfig) -> tuple[bool, ...]:
    """Which blocks see no more than ``config.sliding_window`` positions."""
    count = int(config.num_hidden_layers)
    if not getattr(config, "sliding_window", None):
        return (False,) * count
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (True,) * count
    return tuple(kind == "sliding_attention" for kind in kinds)


def default_windows(family: Family, num_blocks: int) -> tuple[bool, ...]:
    """The pattern of windows that the loader assumes where the file says none."""
    every = family.window_every
    return tuple(bool(every) and index % every < every - 1 for index in range(num_blocks))


def attention_scalar(family: Family, num_blocks: int, hidden: int, heads: int, size: int) -> int:
    """The number by whose square root llama.cpp's Gemma graphs divide queries."""
    return hidden // heads if num_blocks == family.large_model_blocks else size


def rotates(family: Family, num_blocks: int) -> list[int]:
    """1 for each block whose q and k are rotated, else 0 (``no_rope_layers``)."""
    every = family.no_rope_every
    return [int(not every or (index + 1) % every != 0) for index in range(num_blocks)]


def _refuse(family: Family, what: str) -> BadInputError:
    return BadInputError(
        f"{what}; llama.cpp's {family.architecture} does not compute that", _OTHER_FORMAT
    )


def _refuse_what_is_computed_otherwise(
    family: Family, config: PreTrainedConfig, head_size: int
) -> None:
    blocks, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in family.activations:
        raise _refuse(family, f"the MLP computes {activation}")
    if getattr(config, "use_bidirectional_attention", None):
        raise _refuse(family, "tokens attend to later ones")
    if not family.free_head_size and head_size * heads != hidden:
        raise _refuse(family, f"{heads} heads of {head_size} do not make up the width {hidden}")
    if blocks > MAX_BLOCKS:
        raise _refuse(family, f"it has {blocks} blocks, more than {MAX_BLOCKS}")
    if family.tied_head and not (
        getattr(config, "attn_logit_softcapping", None)
        and getattr(config, "final_logit_softcapping", None)
    ):
        raise _refuse(family, "logits or attention are not capped (softcapping: null)")
    if not family.tied_head and getattr(config, "attn_logit_softcapping", None):
        raise _refuse(family, "attention is capped (attn_logit_softcapping)")
    if family.has_windows and config.query_pre_attn_scalar != (
        expected := attention_scalar(family, blocks, hidden, heads, head_size)
    ):
        given = config.query_pre_attn_scalar
        raise _refuse(family, f"query_pre_attn_scalar is {given:g}, not {expected}")
    if list(getattr(config, "no_rope_layers", rotates(family, blocks))) != rotates(family, blocks):
        raise _refuse(family, "other layers than every fourth do without rotation (no_rope_layers)")
    if family.has_experts:
        _refuse_experts(family, config)


def _refuse_experts(family: Family, config: PreTrainedConfig) -> None:
    if config.num_local_experts > MAX_EXPERTS:
        raise _refuse(family, f"it has {config.num_local_experts} experts, above {MAX_EXPERTS}")
    if not getattr(config, "norm_topk_prob", True):
        raise _refuse(family, "the weights of a token's experts do not sum to 1 (norm_topk_prob)")
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise _refuse(family, "some blocks have no experts (mlp_only_layers, decoder_sparse_step)")


def _context_length(family: Family, config: PreTrainedConfig) -> tuple[int, tuple[str, ...]]:
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        raise BadInputError(
            "config.json does not say how long the context may be (max_position_embeddings), "
            "which llama.cpp must know",
            "add it to config.json",
        )
    if _mixes_windows(family, config) or not any(window_flags(config)):
        return int(length), ()
    if config.sliding_window >= length:
        return int(length), ()
    window = int(config.sliding_window)
    return window, (
        f"llama.cpp's {family.architecture} does not compute the model's sliding window; the "
        f"file's context length is the window, {window} (config.json: {length}), within which both "
        "compute the same",
    )


def _mixes_windows(family: Family, config: PreTrainedConfig) -> bool:
    """Whether llama.cpp's graph of blocks with and without a window is the model's.

    It asks for both kinds: with one alone, its cache of the other is empty, which it asserts.
    """
    flags = window_flags(config)
    return family.has_windows and any(flags) and not all(flags)


def _window_values(family: Family, config: PreTrainedConfig, context: int) -> dict[str, TypedValue]:
    flags = window_flags(config)
    if not _mixes_windows(family, config):
        # Gemma 2's loader has windows whatever the file says: one as long as the context is none.
        return {"attention.sliding_window": uint32(context)} if family.tied_head else {}
    values = {"attention.sliding_window": uint32(config.sliding_window)}
    if flags != default_windows(family, len(flags)):
        values["attention.sliding_window_pattern"] = booleans(flags)
    return values


def _cap_values(config: PreTrainedConfig) -> dict[str, TypedValue]:
    return {
        key: float32(cap)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
        if (cap := getattr(config, key, None)) is not None
    }


def _expert_values(config: PreTrainedConfig) -> dict[str, TypedValue]:
    values = {
        "expert_count": uint32(config.num_local_experts),
        "expert_used_count": uint32(config.num_experts_per_tok),
    }
    inner = getattr(config, "moe_intermediate_size", None)
    if inner is not None:
        values["expert_feed_forward_length"] = uint32(inner)
    return values
