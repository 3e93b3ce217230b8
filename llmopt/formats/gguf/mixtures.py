"""Which element type each tensor has in a Q4_K_M file and its kin: llama.cpp's rules.

``llama_model_quantize`` of llama.cpp as in llama-cpp-python 0.3.36 (``src/llama-quant.cpp``) gives
sensitive tensors more bits: the head, values, the second matrix of an MLP in some blocks. The
same mixture here gives every tensor the same type, so that files compare like with like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures.plan import ModelFacts
from llmopt.quantization.ggml.types import GGML_TYPES, GGMLType, fitting_type

QUANTIZATION_VERSION = 2
"""``general.quantization_version``: GGML_QNT_VERSION."""

_BLOCK = re.compile(r"blk\.(\d+)\.")
_EIGHT = 8  # rules for Mixtral 8x7B, which llama.cpp applies to any mixture of eight
_LARGE_BLOCKS = 80  # of the models that llama.cpp takes for 70B


@dataclass(frozen=True, slots=True)
class Mixture:
    """A kind of file.

    Attributes:
        name: as llama.cpp's tools spell it.
        file_type: ``general.file_type``: LLAMA_FTYPE.
        base: the type of every matrix that no rule gives another.
    """

    name: str
    file_type: int
    base: str


MIXTURES: Mapping[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        Mixture("F32", 0, "F32"),
        Mixture("F16", 1, "F16"),
        Mixture("BF16", 32, "BF16"),
        Mixture("Q8_0", 7, "Q8_0"),
        Mixture("Q4_0", 2, "Q4_0"),
        Mixture("Q4_1", 3, "Q4_1"),
        Mixture("Q5_0", 8, "Q5_0"),
        Mixture("Q5_1", 9, "Q5_1"),
        Mixture("Q2_K", 10, "Q2_K"),
        Mixture("Q3_K_S", 11, "Q3_K"),
        Mixture("Q3_K_M", 12, "Q3_K"),
        Mixture("Q3_K_L", 13, "Q3_K"),
        Mixture("Q4_K_S", 14, "Q4_K"),
        Mixture("Q4_K_M", 15, "Q4_K"),
        Mixture("Q5_K_S", 16, "Q5_K"),
        Mixture("Q5_K_M", 17, "Q5_K"),
        Mixture("Q6_K", 18, "Q6_K"),
        Mixture("IQ4_NL", 25, "IQ4_NL"),
        Mixture("IQ4_XS", 30, "IQ4_XS"),
    )
}
"""The kinds of files that llmopt writes, by name."""


@dataclass(frozen=True, slots=True)
class ChosenType:
    """The type of a tensor of a file.

    Attributes:
        type: to be stored.
        wanted: what the mixture gives it; another than ``type`` where rows are not whole blocks.
    """

    type: GGMLType
    wanted: GGMLType

    @property
    def is_fallback(self) -> bool:
        """Whether rows did not divide into blocks, which the report names."""
        return self.type != self.wanted


def find_mixture(name: str) -> Mixture:
    """The mixture of a name.

    Raises:
        BadInputError: if there is none; names the closest.
    """
    if name in MIXTURES:
        return MIXTURES[name]
    close = get_close_matches(name.upper(), MIXTURES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise BadInputError(
        f"{name!r} is not a kind of GGUF file that llmopt writes",
        f"{hint}the kinds are {', '.join(MIXTURES)}",
    )


def tensor_types(
    mixture: Mixture,
    facts: ModelFacts,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    *,
    has_importance: bool,
) -> dict[str, ChosenType]:
    """The type of every tensor of a file.

    Args:
        mixture: what the file is.
        facts: of the model.
        tensors: all names and shapes of the file (the row's width last).
        has_importance: whether an importance matrix is used, which moves some rules.

    Returns:
        By name, in the given order. Vectors and routers stay float32.
    """
    shapes = dict(tensors)
    rules = _Rules(mixture, facts, tied="output.weight" not in shapes, weighted=has_importance)
    chosen = {}
    for name, shape in shapes.items():
        wanted = GGML_TYPES[rules.wanted(name, shape[-1]) if _is_matrix(name, shape) else "F32"]
        chosen[name] = ChosenType(fitting_type(wanted, shape[-1]), wanted)
    return chosen


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    router = "ffn_gate_inp.weight" in name
    return len(shape) > 1 and name.endswith("weight") and "_norm.weight" not in name and not router


def _gets_more_bits(block: int, count: int) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    first = count // 8
    return block < first or block >= 7 * count // 8 or (block - first) % 3 == 2


@dataclass(frozen=True, slots=True)
class _Rules:
    """llama.cpp's rules for one file.

    Attributes:
        mixture: what the file is.
        facts: of the model.
        tied: the embedding is the head.
        weighted: an importance matrix is used.
    """

    mixture: Mixture
    facts: ModelFacts
    tied: bool
    weighted: bool

    def wanted(self, name: str, width: int) -> str:
        """The type that a matrix is given, before its rows are looked at."""
        base = self.mixture.base
        if GGML_TYPES[base].is_plain:
            return base
        if name == "output.weight" or (name == "token_embd.weight" and self.tied):
            return self._head(width)
        found = _BLOCK.match(name)
        if found is None:
            return base
        block = int(found.group(1))
        rules: tuple[tuple[tuple[str, ...], Callable[[int], str | None]], ...] = (
            (("attn_v.weight", "attn_qkv.weight"), self._value),
            (("attn_k.weight",), self._key),
            (("attn_output.weight",), self._attention_output),
            (("ffn_down",), self._mlp_down),
        )
        for parts, rule in rules:
            if any(part in name for part in parts):
                return rule(block) or base
        return base

    def _head(self, width: int) -> str:
        base = GGML_TYPES[self.mixture.base]
        return "Q8_0" if base.name == "Q8_0" or width % base.block_size else "Q6_K"

    @property
    def _shares_heads(self) -> bool:
        """Whether four or more query heads share a head of k and v."""
        return self.facts.num_heads // self.facts.num_key_value_heads >= 4

    @property
    def _is_large(self) -> bool:
        """Whether llama.cpp takes the model for one of 70B: 80 blocks, Llama with shared heads."""
        facts = self.facts
        if facts.num_blocks != _LARGE_BLOCKS:
            return False
        grouped = facts.num_heads != facts.num_key_value_heads and facts.num_experts != _EIGHT
        return facts.architecture == "qwen2" or (facts.architecture == "llama" and grouped)

    def _value(self, block: int) -> str | None:
        if self.facts.num_experts == _EIGHT:
            return "Q8_0"
        more = _gets_more_bits(block, self.facts.num_blocks)
        kind = {
            "Q2_K": "Q4_K" if self._shares_heads else "Q3_K",
            "Q3_K_M": "Q5_K" if block < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if block < 4 else None,
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
            "IQ4_NL": "Q5_K" if self._shares_heads else None,
            "IQ4_XS": "Q5_K" if self._shares_heads else None,
        }.get(self.mixture.name)
        if self._is_large and (kind or self.mixture.base) in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return kind

    def _key(self, block: int) -> str | None:
        return "Q8_0" if self.facts.num_experts == _EIGHT else None

    def _attention_output(self, block: int) -> str | None:
        if self.facts.num_experts == _EIGHT:
            lifted = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if self.mixture.name in lifted else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.mixture.name)

    def _mlp_down(self, block: int) -> str | None:
        count = self.facts.num_blocks
        early, more = block < count // 8, _gets_more_bits(block, count)
        guarded = early and self.weighted
        unguarded = early and not self.weighted
        return {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if block < count // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if early else None,
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
            "Q4_0": "Q4_1" if guarded else None,
            "Q5_0": "Q5_1" if guarded else None,
            "IQ4_NL": "Q5_K" if unguarded else None,
            "IQ4_XS": "Q5_K" if unguarded else None,
        }.get(self.mixture.name)
