"""GPTQ files: what GPTQModel, auto-gptq, transformers and vLLM call ``quant_method: gptq``.

For a linear layer ``m`` of ``(out, in)`` weights: ``m.qweight (in * bits / 32, out) int32``, packed
along ``in`` as one stream of bits from the lowest up (at 3 bits some codes straddle two words);
``m.qzeros (groups, out * bits / 32) int32``, packed along ``out`` alike; ``m.scales (groups,
out)``; ``m.g_idx (in,) int32``, the group of each column. A bias stays ``m.bias``.

There are two variants, told apart by ``checkpoint_format`` in the config alone. ``gptq`` (v1)
stores each zero point less one, ``gptq_v2`` as it is. What a v1 reader makes of a zero point of 0,
stored as -1, differs: auto-gptq takes the maximum plus one, GPTQModel adds 1 to the whole word and
carries into the neighbour. Such zero points are neither written nor read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.formats.bitstream import pack_rows, unpack_rows
from llmopt.formats.gptq_config import (
    CheckpointFormat,
    GPTQSchemes,
    read_config,
    rules,
    scheme_keys,
)
from llmopt.formats.layer_names import check_layers
from llmopt.formats.parts import (
    INDICES,
    SCALES,
    WORDS,
    check_group_index,
    check_midpoint,
    check_scales,
    count_groups,
    read_part,
    trivial_groups,
)
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme
from llmopt.quantization.storage import stored_bits_per_weight

_LEAD = "qweight"
_PARTS = (_LEAD, "qzeros", "scales", "g_idx")
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class GPTQ:
    """The GPTQ format in one of its two variants."""

    checkpoint_format: CheckpointFormat = "gptq"

    name = "gptq"
    takes_patterns = True

    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot hold ``scheme``, or ``None`` if it can."""
        if scheme.activation_order == "group" and scheme.group_size is None:
            return (
                "GPTQ has no activation order by group with per-channel scales: there is one "
                "group only"
            )
        return None

    def shape_refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold a weight of ``shape (out, in)``, or ``None`` if it can."""
        for label, size in zip(("output", "input"), shape, strict=True):
            if size * scheme.bits % _WORD_BITS:
                return (
                    f"{size} {label} features of {scheme.bits} bits do not fill whole 32-bit words"
                )
        return None

    def mixture_refusal(self, schemes: Collection[Scheme]) -> str | None:
        """Why one checkpoint cannot hold all of ``schemes``; GPTQ has rules for single layers."""
        del schemes
        return None

    def bits_per_weight(
        self, scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> float:
        """Stored bits a weight; zero points and a group index are always there."""
        return stored_bits_per_weight(
            scheme, shape, scale_dtype, zero_points=True, group_index=True
        )

    def pack(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The checkpoint tensors, by full name, that stand for ``module``'s weight.

        Raises:
            BadInputError: a shape that does not fill words, or a zero point that this variant
                cannot store.
        """
        scheme, columns = tensor.scheme, tensor.shape[1]
        if refusal := self.shape_refusal(scheme, tensor.shape):
            raise BadInputError(f"{module}: {refusal}", "choose compressed-tensors")
        zero_points = tensor.zero_points
        if zero_points is None:
            zero_points = torch.full(tensor.scales.shape, scheme.midpoint, dtype=torch.uint8)
        if self.checkpoint_format == "gptq":
            if bool((zero_points == 0).any()):
                raise BadInputError(
                    f"{module} has a zero point of 0, which GPTQ v1 stores as -1: its readers "
                    "disagree about what that means",
                    "choose checkpoint_format gptq_v2, or another format",
                )
            zero_points = zero_points - 1
        groups = tensor.group_index
        if groups is None:
            groups = trivial_groups(columns, scheme.columns_per_group(columns))
        packed = {
            "qweight": pack_rows(tensor.codes, scheme.bits).t(),
            "qzeros": pack_rows(zero_points.t(), scheme.bits),
            "scales": tensor.scales.t(),
            "g_idx": groups.to(torch.int32),
        }
        return {
            f"{module}.{part}": value.clone(memory_format=torch.contiguous_format)
            for part, value in packed.items()
        }

    def unpack(self, module: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedTensor:
        """The inverse of :meth:`pack`.

        Raises:
            BadInputError: parts that are missing, or do not fit each other or ``scheme``; a zero
                point or group index out of range; zero points or an order of groups that the
                config denies.
        """
        rows, columns = self.weight_shape(module, read, scheme)
        groups = count_groups(module, scheme, columns)
        zero_words = rows * scheme.bits // _WORD_BITS
        packed = read_part(module, "qweight", read, WORDS, (None, rows))
        scales = read_part(module, "scales", read, SCALES, (groups, rows))
        qzeros = read_part(module, "qzeros", read, WORDS, (groups, zero_words))
        index = read_part(module, "g_idx", read, INDICES, (columns,))
        index = check_group_index(module, "g_idx", index, groups)
        if scheme.activation_order != "group" and not torch.equal(
            index, trivial_groups(columns, columns // groups)
        ):
            raise BadInputError(
                f"{module}.g_idx puts groups in activation order, but the config says desc_act "
                "false: readers that trust the config would take other scales",
                "set desc_act to true in the config, if its maker says so",
            )
        check_scales(module, scales)
        zero_points = self._zero_points(module, unpack_rows(qzeros, scheme.bits, rows), scheme)
        return QuantizedTensor(
            codes=unpack_rows(packed.t(), scheme.bits, columns),
            scales=scales.t().contiguous(),
            zero_points=zero_points,
            group_index=index if scheme.activation_order == "group" else None,
            scheme=scheme,
        )

    def _zero_points(self, module: str, stored: Tensor, scheme: Scheme) -> Tensor | None:
        """``stored (groups, out)`` as ``(out, groups)``, or ``None`` for a symmetric scheme."""
        if self.checkpoint_format == "gptq":
            if bool((stored == scheme.max_code).any()):
                raise BadInputError(
                    f"{module}.qzeros holds {scheme.max_code}: plus one, as GPTQ v1 counts, no "
                    f"zero point of {scheme.bits} bits, and readers disagree about it",
                    "if its maker wrote gptq_v2, say so in the config's checkpoint_format",
                )
            stored = stored + 1
        if scheme.symmetric:
            as_other = stored - 1 if self.checkpoint_format == "gptq" else stored + 1
            swapped = bool((as_other == scheme.midpoint).all())
            hint = f" (checkpoint_format {self.checkpoint_format} is probably wrong)"
            check_midpoint(module, stored, scheme.midpoint, hint if swapped else "")
            return None
        return stored.t().contiguous()

    def weight_name(self, tensor_name: str) -> tuple[str, bool] | None:
        """``(module, leads)`` if the tensor is part of a packed weight, else ``None``."""
        module, _, part = tensor_name.rpartition(".")
        return (module, part == _LEAD) if part in _PARTS else None

    def weight_shape(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """Logical ``(out, in)`` of a packed weight."""
        words, rows = read_part(module, "qweight", read, WORDS, (None, None)).shape
        columns, rest = divmod(words * _WORD_BITS, scheme.bits)
        if rest or self.shape_refusal(scheme, (rows, columns)):
            raise BadInputError(
                f"{module}.qweight of {words} by {rows} words is no weight of {scheme.bits} bits",
                "correct bits in the config, or download the checkpoint again",
            )
        return int(rows), int(columns)

    def config(self, schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, JsonValue]:
        """``quantization_config``; layers that differ from the most common scheme get rules.

        Raises:
            BadInputError: if no layer is quantized, or one is quantized and ignored.
        """
        check_layers(schemes, ignored)
        base = Counter(schemes.values()).most_common(1)[0][0]
        config: dict[str, JsonValue] = {
            "quant_method": "gptq",
            **scheme_keys(base),
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "lm_head": False,
        }
        return config | rules(base, schemes, ignored)

    def companion_files(
        self, config: Mapping[str, JsonValue]
    ) -> dict[str, Mapping[str, JsonValue]]:
        """``quantize_config.json``, which auto-gptq and GPTQModel read before ``config.json``."""
        return {"quantize_config.json": {**config, "model_file_base_name": "model"}}

    def schemes(self, config: Mapping[str, JsonValue]) -> GPTQSchemes:
        """Which scheme ``config`` gives to which module.

        Raises:
            BadInputError: if it is another method or variant, or holds what llmopt does not read.
        """
        table = read_config(config)
        if table.checkpoint_format != self.checkpoint_format:
            raise BadInputError(
                f"the config says checkpoint_format {table.checkpoint_format}, "
                f"not {self.checkpoint_format}",
                "read it with the variant that it names",
            )
        return table
