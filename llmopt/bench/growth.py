"""A small model's function in a large model's shape, for benchmarks on small machines.

A trained model of millions of parameters answers sensibly but costs nothing to decode; a random one
of a billion costs what it should and says noise. Grown, the small one computes what it computed
before, at the large one's cost (cf. Net2Net, Chen et al. 2016, https://arxiv.org/abs/1511.05641):

- Width: every hidden channel is written ``copies`` times and the rest is zero, ``padding`` times
  as many. A root mean square over them is ``padding ** -0.5`` of what it was: norm weights shrink
  by ``padding ** 0.5`` and epsilon by ``padding``. ``padding`` is a power of 4 and ``copies`` 1 or
  2, so that all of it is exact in every floating-point type.
- Heads and intermediate channels: added ones are zero, as is what reads them.
- Depth: added blocks are copies of the source's whose two writers to the residual are zero. They
  read, rotate and cache keys and values as their originals do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmopt.errors import BadInputError

LABEL = "llmopt_grown"
"""Key of ``config.json`` that says what was done."""

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Plain pre-norm blocks: one norm width, no norm over heads (which would share the epsilon)."""

MIN_BLOCKS = 16
"""A grown model is as wide as leaves it this deep, which models of a billion parameters are."""

_ROTARY = ("default", "linear", "llama3")  # others turn by other angles when the context grows
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}

Axis = Literal["channels", "reader", "more"]
"""What a dimension is: hidden channels as written, as read, or something zero is added to."""

_AXES: Mapping[str, tuple[Axis, ...]] = {
    "embed_tokens.weight": ("more", "channels"),
    "lm_head.weight": ("more", "channels"),
    "q_proj.weight": ("more", "reader"),
    "k_proj.weight": ("more", "reader"),
    "v_proj.weight": ("more", "reader"),
    "gate_proj.weight": ("more", "reader"),
    "up_proj.weight": ("more", "reader"),
    "o_proj.weight": ("channels", "more"),
    "down_proj.weight": ("channels", "more"),
    "q_proj.bias": ("more",),
    "k_proj.bias": ("more",),
    "v_proj.bias": ("more",),
    "gate_proj.bias": ("more",),
    "up_proj.bias": ("more",),
    "o_proj.bias": ("channels",),
    "down_proj.bias": ("channels",),
}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_FINAL_NORM = "model.norm.weight"
_TABLES = ("embed_tokens.weight", "lm_head.weight")
_WRITERS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")


@dataclass(frozen=True, slots=True)
class Growth:
    """What becomes of a model.

    Attributes:
        factor: of hidden width, heads, key-value heads and intermediate width; a power of two.
        num_blocks: of the grown model.
        positions: its ``max_position_embeddings``.
    """

    factor: int
    num_blocks: int
    positions: int

    @property
    def padding(self) -> int:
        """Hidden channels for each that is not zero: the largest power of 4 in the factor."""
        power: int = 4 ** (int(math.log2(self.factor)) // 2)
        return power

    @property
    def copies(self) -> int:
        """How often each of the source's hidden channels is there."""
        return self.factor // self.padding


def parse_count(text: str) -> int:
    """``300M`` as a number.

    Raises:
        BadInputError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB])", text.strip().upper())
    if match is None or not float(match[1]):
        raise BadInputError(
            f"{text!r} is no number of parameters", "write it as 300M, 1B or the like"
        )
    return round(float(match[1]) * _UNITS[match[2]])


def plan_growth(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    num_parameters: int,
    positions: int = 0,
) -> Growth:
    """As wide as leaves :data:`MIN_BLOCKS` blocks, and as deep as comes closest to the number.

    Args:
        config: the source's ``config.json``.
        shapes: of its tensors, by name on disk.
        num_parameters: wanted.
        positions: the least context wanted; the source's where that is longer.

    Raises:
        BadInputError: an architecture that cannot be grown, a rotary embedding that depends on the
            context, or a number that is too small.
    """
    check_growable(config, shapes)
    own = int(config["max_position_embeddings"])
    rotary = rotary_type(config)
    if positions > own and rotary not in _ROTARY:
        raise BadInputError(
            f"the source turns by {rotary} angles, which follow the context length {own}",
            f"ask for contexts of at most {own} tokens",
        )
    depth, factor, best = int(config["num_hidden_layers"]), 1, None
    while (blocks := _blocks_for(shapes, factor, num_parameters)) >= max(depth, MIN_BLOCKS):
        best = Growth(factor, blocks, max(own, positions))
        factor *= 2
    if best is None:
        least = count_parameters(shapes, Growth(1, max(depth, MIN_BLOCKS), own))
        raise BadInputError(
            f"{num_parameters:,} parameters are too few for a model of "
            f"{max(depth, MIN_BLOCKS)} blocks",
            f"ask for {math.ceil(least / 1e6)}M or more",
        )
    return best


def check_growable(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold that every tensor has a known part in an architecture that can be grown.

    Raises:
        BadInputError: it has not.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES or "quantization_config" in config:
        what = "a quantized checkpoint" if kind in MODEL_TYPES else f"a model of type {kind!r}"
        raise BadInputError(
            f"{what} cannot be grown", f"take one in 16 bit of type {', '.join(MODEL_TYPES)}"
        )
    for name in shapes:
        if name != _FINAL_NORM and _leaf(name) not in (*_AXES, *_NORMS):
            raise BadInputError(
                f"the source's tensor {name} has no known part in a {kind} block",
                "grow the checkpoint as transformers writes it",
            )


def count_parameters(shapes: Mapping[str, tuple[int, ...]], growth: Growth) -> int:
    """Of the grown model; a tied head counts once."""
    return _outer_count(shapes, growth.factor) + growth.num_blocks * _block_count(
        shapes, growth.factor
    )


def grown_config(
    config: Mapping[str, Any], growth: Growth, label: Mapping[str, Any]
) -> dict[str, Any]:
    """The grown model's ``config.json``, which says under :data:`LABEL` what it is."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    hidden = int(config["hidden_size"])
    changed = {
        "hidden_size": hidden * growth.factor,
        "intermediate_size": int(config["intermediate_size"]) * growth.factor,
        "num_attention_heads": heads * growth.factor,
        "num_key_value_heads": kv_heads * growth.factor,
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "num_hidden_layers": growth.num_blocks,
        "rms_norm_eps": config["rms_norm_eps"] / growth.padding,
        "max_position_embeddings": growth.positions,
        LABEL: {**label, **asdict(growth), "padding": growth.padding, "copies": growth.copies},
    }
    types = config.get("layer_types")
    if types is not None:
        changed["layer_types"] = [types[i % len(types)] for i in range(growth.num_blocks)]
    return {**config, **changed}


def grow_tensor(name: str, tensor: Tensor, growth: Growth) -> Tensor:
    """A tensor of the source in the grown model's shape, same element type, nothing rounded.

    Args:
        name: on disk.
        tensor: ``(out, in)`` or ``(channels,)``.
        growth: the shape.

    Raises:
        BadInputError: a norm weight so small that its element type cannot hold its half.
    """
    leaf = _leaf(name)
    if name == _FINAL_NORM or leaf in _NORMS:
        # Of an embedding and a head with every channel `copies` times, logits are so much larger.
        scale = math.sqrt(growth.padding) * (growth.copies if name == _FINAL_NORM else 1)
        shrunk = tensor / scale
        if not torch.equal(shrunk * scale, tensor):
            raise BadInputError(
                f"{name} has values too small for {tensor.dtype} to hold a fraction of",
                "write the source in float32 or bfloat16",
            )
        return shrunk.repeat(growth.factor)
    axes = _AXES[leaf]
    for dim, axis in enumerate(axes):
        if axis == "channels":
            tensor = torch.cat([tensor] * growth.copies, dim)
    table = leaf in _TABLES
    grown = tensor.new_zeros(
        [
            size * growth.padding
            if axis == "channels"
            else size * (1 if table and axis == "more" else growth.factor)
            for size, axis in zip(tensor.shape, axes, strict=True)
        ]
    )
    grown[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return grown


def identity_tensor(name: str, tensor: Tensor) -> Tensor:
    """A grown block's tensor in a block that adds nothing to the residual."""
    return torch.zeros_like(tensor) if _leaf(name) in _WRITERS else tensor


def rotary_type(config: Mapping[str, Any]) -> str:
    """``default``, ``linear``, ``yarn``, ..."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def _blocks_for(shapes: Mapping[str, tuple[int, ...]], factor: int, num_parameters: int) -> int:
    rest = num_parameters - _outer_count(shapes, factor)
    return round(rest / _block_count(shapes, factor))


def _block_count(shapes: Mapping[str, tuple[int, ...]], factor: int) -> int:
    first = [shape for name, shape in shapes.items() if ".layers.0." in name]
    return sum(math.prod(shape) * factor ** len(shape) for shape in first)


def _outer_count(shapes: Mapping[str, tuple[int, ...]], factor: int) -> int:
    outer = [shape for name, shape in shapes.items() if ".layers." not in name]
    return sum(math.prod(shape) * factor for shape in outer)


def _leaf(name: str) -> str:
    return ".".join(name.split(".")[-2:])
