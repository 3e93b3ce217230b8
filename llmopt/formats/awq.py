"""AWQ files in the GEMM layout: what AutoAWQ, GPTQModel, transformers and vLLM call ``awq``.

For a linear layer ``m`` of ``(out, in)`` weights, 4 bits: ``m.qweight (in, out / 8) int32`` and
``m.qzeros (groups, out / 8) int32``, both packed along ``out`` with the eight codes of a word in
the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first; ``m.scales (groups, out)``. Zero points are
always stored, so a symmetric scheme is 8 everywhere. A bias stays ``m.bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.formats.bitstream import pack_rows, unpack_rows
from llmopt.formats.config_values import read_names, read_truth, read_whole
from llmopt.formats.layer_names import check_layers
from llmopt.formats.parts import (
    SCALES,
    WORDS,
    check_midpoint,
    check_scales,
    count_groups,
    read_part,
)
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme
from llmopt.quantization.storage import stored_bits_per_weight

_LEAD = "qweight"
_PARTS = (_LEAD, "qzeros", "scales")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(_ORDER.index(place) for place in range(len(_ORDER)))
_BITS = 4
_WORD_CODES = 8


class AWQ:
    """The AWQ GEMM format."""

    name = "awq"
    checkpoint_format = None
    takes_patterns = False

    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot hold ``scheme``, or ``None`` if it can."""
        if scheme.bits != _BITS:
            return f"AWQ GEMM holds {_BITS} bits only"
        if scheme.activation_order == "group":
            return "AWQ has no activation order by group: it stores no group index"
        return None

    def shape_refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold a weight of ``shape (out, in)``, or ``None`` if it can."""
        del scheme
        if shape[0] % _WORD_CODES:
            return f"{shape[0]} output features of 4 bits do not fill whole 32-bit words"
        return None

    def mixture_refusal(self, schemes: Collection[Scheme]) -> str | None:
        """Why one checkpoint cannot hold all of ``schemes``, or ``None`` if it can."""
        sizes = {scheme.group_size for scheme in schemes}
        return None if len(sizes) < 2 else "its config has one group size for all layers"

    def bits_per_weight(
        self, scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> float:
        """Stored bits a weight; zero points are always there."""
        return stored_bits_per_weight(scheme, shape, scale_dtype, zero_points=True)

    def pack(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The checkpoint tensors, by full name, that stand for ``module``'s weight.

        Raises:
            BadInputError: a scheme or shape that AWQ does not hold.
        """
        why = self.refusal(tensor.scheme) or self.shape_refusal(tensor.scheme, tensor.shape)
        if why:
            raise BadInputError(f"{module}: {why}", "choose compressed-tensors")
        zero_points = tensor.zero_points
        if zero_points is None:
            shape = tensor.scales.shape
            zero_points = torch.full(shape, tensor.scheme.midpoint, dtype=torch.uint8)
        packed = {
            "qweight": pack_rows(_reorder(tensor.codes.t(), _ORDER), _BITS),
            "qzeros": pack_rows(_reorder(zero_points.t(), _ORDER), _BITS),
            "scales": tensor.scales.t().clone(memory_format=torch.contiguous_format),
        }
        return {f"{module}.{part}": value for part, value in packed.items()}

    def unpack(self, module: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedTensor:
        """The inverse of :meth:`pack`.

        Raises:
            BadInputError: parts that are missing, or do not fit each other or ``scheme``.
        """
        rows, columns = self.weight_shape(module, read, scheme)
        groups = count_groups(module, scheme, columns)
        packed = read_part(module, "qweight", read, WORDS, (columns, None))
        scales = read_part(module, "scales", read, SCALES, (groups, rows))
        qzeros = read_part(module, "qzeros", read, WORDS, (groups, rows // _WORD_CODES))
        check_scales(module, scales)
        zero_points: Tensor | None = _reorder(unpack_rows(qzeros, _BITS, rows), _INVERSE).t()
        assert zero_points is not None
        if scheme.symmetric:
            check_midpoint(module, zero_points, scheme.midpoint)
            zero_points = None
        return QuantizedTensor(
            codes=_reorder(unpack_rows(packed, _BITS, rows), _INVERSE).t().contiguous(),
            scales=scales.t().contiguous(),
            zero_points=None if zero_points is None else zero_points.contiguous(),
            group_index=None,
            scheme=scheme,
        )

    def weight_name(self, tensor_name: str) -> tuple[str, bool] | None:
        """``(module, leads)`` if the tensor is part of a packed weight, else ``None``."""
        module, _, part = tensor_name.rpartition(".")
        return (module, part == _LEAD) if part in _PARTS else None

    def weight_shape(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """Logical ``(out, in)`` of a packed weight."""
        del scheme
        columns, words = read_part(module, "qweight", read, WORDS, (None, None)).shape
        return int(words) * _WORD_CODES, int(columns)

    def config(self, schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, JsonValue]:
        """``quantization_config``; ``ignored`` are parts of names, as its readers take them.

        Raises:
            BadInputError: if no layer is quantized, several schemes do not go together, or an
                ignored name is part of a quantized layer's.
        """
        check_layers(schemes, ())  # what is ignored is held to more below
        if why := self.mixture_refusal(set(schemes.values())):
            raise BadInputError(f"AWQ: {why}", "choose one group size, or another format")
        for name in ignored:
            if taken := next((module for module in schemes if name in module), None):
                raise BadInputError(
                    f"AWQ's readers would skip the quantized {taken} with the ignored {name}",
                    "quantize both or neither, or choose another format",
                )
        group_size = next(iter(schemes.values())).group_size
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": -1 if group_size is None else group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored),
        }

    def companion_files(
        self, config: Mapping[str, JsonValue]
    ) -> dict[str, Mapping[str, JsonValue]]:
        """Files beside ``config.json``: none."""
        del config
        return {}

    def schemes(self, config: Mapping[str, JsonValue]) -> AWQSchemes:
        """Which scheme ``config`` gives to which module; old and new names of keys are read.

        Raises:
            BadInputError: if it is another method or layout, or no scheme of AWQ GEMM.
        """
        method = str(config.get("quant_method", "awq")).lower()
        layout = str(config.get("version") or config.get("format") or "gemm").lower()
        if method != "awq" or layout != "gemm":
            raise BadInputError(
                f"{method} in the layout {layout!r} is not one llmopt reads",
                "take the model in AWQ's GEMM layout (version: gemm)",
            )
        where = "the AWQ config"
        bits = read_whole(config, "bits" if "bits" in config else "w_bit", where, _BITS)
        size_key = "group_size" if "group_size" in config else "q_group_size"
        group_size = read_whole(config, size_key, where, 128)
        if bits != _BITS or not (group_size == -1 or group_size > 0):
            raise BadInputError(
                f"AWQ of {bits} bits in groups of {group_size} is not a scheme of llmopt",
                "llmopt reads AWQ of 4 bits, by group or channel (-1)",
            )
        scheme = Scheme(
            bits=4,
            group_size=None if group_size == -1 else group_size,
            symmetric=not read_truth(config, "zero_point", where, True),
        )
        return AWQSchemes(scheme, read_names(config, "modules_to_not_convert", where))


@dataclass(frozen=True, slots=True)
class AWQSchemes:
    """One scheme for all layers but those whose name holds one of ``skipped``."""

    scheme: Scheme
    skipped: tuple[str, ...]

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer."""
        return None if any(part in module for part in self.skipped) else self.scheme


def _reorder(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Each eight of ``codes (rows, n)`` in another order."""
    rows, count = codes.shape
    words = codes.reshape(rows, count // _WORD_CODES, _WORD_CODES)
    return words[..., list(order)].reshape(rows, count)
