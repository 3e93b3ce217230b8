"""ggml's blocks as bytes, both ways, as the structs of ``ggml-common.h`` have them.

Almost every part of a block is made of bit planes: ``8 / bits`` runs of equal width share bytes,
the first in the lowest bits. So a layout is a list of such parts; only the interleaved six-bit
scales of Q4_K and Q5_K and the nibble pairs of Q2_K are functions of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.ggml.tensor import GGMLTensor
from llmopt.quantization.ggml.threads import each_slice, row_slices
from llmopt.quantization.ggml.types import GGMLType

_PACKED_ELEMENTS = 1 << 20  # at a time

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Planes:
    """Bits ``low .. low + bits`` of each value; the values in ``groups`` of ``8/bits`` runs."""

    of: Literal["codes", "sub_scales"]
    low: int
    bits: int
    groups: int
    width: int

    @property
    def num_bytes(self) -> int:
        return self.groups * self.width


@dataclass(frozen=True, slots=True)
class _Part:
    """A part with a function of its own: a float16, or scales and minimums interleaved."""

    of: Literal["scales", "mins", "six_bit_pairs", "nibble_pairs"]
    num_bytes: int


_SCALE, _MIN = _Part("scales", 2), _Part("mins", 2)
_NIBBLES = _Planes("codes", 0, 4, 1, 16)  # of 32 weights: j and j + 16 share a byte
_FIFTH_BITS = _Planes("codes", 4, 1, 4, 1)  # of 32 weights: a 32-bit mask
_K_NIBBLES = _Planes("codes", 0, 4, 4, 32)  # of 256: j and j + 32 of each 64
_K_PAIRS = _Planes("codes", 0, 2, 2, 32)  # of 256: j, j + 32, j + 64, j + 96 of each 128
_SIX_BIT_PAIRS = _Part("six_bit_pairs", 12)

_LAYOUTS: dict[str, tuple[_Planes | _Part, ...]] = {
    "Q8_0": (_SCALE, _Planes("codes", 0, 8, 32, 1)),
    "Q4_0": (_SCALE, _NIBBLES),
    "Q4_1": (_SCALE, _MIN, _NIBBLES),
    "Q5_0": (_SCALE, _FIFTH_BITS, _NIBBLES),
    "Q5_1": (_SCALE, _MIN, _FIFTH_BITS, _NIBBLES),
    "Q2_K": (_Part("nibble_pairs", 16), _K_PAIRS, _SCALE, _MIN),
    "Q3_K": (
        _Planes("codes", 2, 1, 1, 32),
        _K_PAIRS,
        _Planes("sub_scales", 0, 4, 1, 8),
        _Planes("sub_scales", 4, 2, 1, 4),
        _SCALE,
    ),
    "Q4_K": (_SCALE, _MIN, _SIX_BIT_PAIRS, _K_NIBBLES),
    "Q5_K": (_SCALE, _MIN, _SIX_BIT_PAIRS, _Planes("codes", 4, 1, 1, 32), _K_NIBBLES),
    "Q6_K": (
        _Planes("codes", 0, 4, 2, 64),
        _Planes("codes", 4, 2, 2, 32),
        _Planes("sub_scales", 0, 8, 16, 1),
        _SCALE,
    ),
    "IQ4_NL": (_SCALE, _NIBBLES),
    "IQ4_XS": (
        _SCALE,
        _Planes("sub_scales", 4, 2, 2, 1),
        _Planes("sub_scales", 0, 4, 4, 1),
        _Planes("codes", 0, 4, 8, 16),
    ),
}

# Files have two's complement codes in Q8_0 and sub-scales in Q6_K; elsewhere signed numbers are
# stored with a bias.
_SCALE_BIAS = {"Q3_K": 32, "IQ4_XS": 32}
_TWOS_COMPLEMENT_CODES = "Q8_0"


def pack_blocks(tensor: GGMLTensor) -> Tensor:
    """The bytes that a file has: ``(out, type.row_bytes(in)) uint8``, on the tensor's device."""
    rows, columns = tensor.shape
    packed = torch.empty(
        (rows, tensor.type.row_bytes(columns)), dtype=torch.uint8, device=tensor.codes.device
    )
    slices = row_slices(rows, max(1, _PACKED_ELEMENTS // columns))
    each_slice(lambda part: _pack_rows(tensor.take_rows(part), packed[part]), slices, packed.device)
    return packed


def _pack_rows(tensor: GGMLTensor, target: Tensor) -> None:
    """Write some rows' bytes into ``target (rows, row_bytes) uint8``."""
    kind = tensor.type
    packed = target.view(-1, kind.block_bytes)
    codes = tensor.codes.reshape(-1, kind.block_size)
    if kind.name == _TWOS_COMPLEMENT_CODES:
        codes = codes ^ 0x80
    sub_scales = _stored(tensor.sub_scales, kind, _SCALE_BIAS.get(kind.name, 0))
    sub_mins = _stored(tensor.sub_mins, kind, 0)
    start = 0
    for part in _LAYOUTS[kind.name]:
        place = packed[:, start : start + part.num_bytes]
        start += part.num_bytes
        if isinstance(part, _Planes):
            source = codes if part.of == "codes" else sub_scales
            assert source is not None
            _pack_planes(source, part, place)
        elif part.of in ("scales", "mins"):
            values = tensor.scales if part.of == "scales" else tensor.mins
            assert values is not None and values.dtype == torch.float16
            place.copy_(values.reshape(-1, 1).contiguous().view(torch.uint8))
        else:
            assert sub_scales is not None and sub_mins is not None
            pack_pairs = _pack_six_bit if part.of == "six_bit_pairs" else _pack_nibbles
            place.copy_(pack_pairs(sub_scales, sub_mins))


def unpack_blocks(data: Tensor, kind: GGMLType, in_features: int) -> GGMLTensor:
    """What ``data (out, type.row_bytes(in)) uint8`` stands for; the inverse of ``pack_blocks``.

    Any bytes are blocks; a scale may come out NaN or infinite.

    Raises:
        BadInputError: if the bytes are not rows of ``in_features`` weights of a block type.
    """
    if kind.is_plain:
        raise BadInputError(
            f"{kind.name} has no blocks to unpack", "read plain tensors with unpack_plain"
        )
    row_bytes = kind.row_bytes(in_features)
    _check_bytes(data, row_bytes, kind)
    rows = data.shape[0]
    blocks = data.reshape(-1, kind.block_bytes)
    codes = torch.zeros((len(blocks), kind.block_size), dtype=torch.uint8, device=data.device)
    floats: dict[str, Tensor] = {}
    sub_scales = sub_mins = None
    if kind.sub_scale_limits is not None:
        sub_scales = codes.new_zeros((len(blocks), kind.sub_blocks))
    start = 0
    for part in _LAYOUTS[kind.name]:
        source = blocks[:, start : start + part.num_bytes]
        start += part.num_bytes
        if isinstance(part, _Planes):
            target = codes if part.of == "codes" else sub_scales
            assert target is not None
            _unpack_planes(source, part, target)
        elif part.of in ("scales", "mins"):
            floats[part.of] = source.contiguous().view(torch.float16).view(rows, -1)
        else:
            unpack_pairs = _unpack_six_bit if part.of == "six_bit_pairs" else _unpack_nibbles
            sub_scales, sub_mins = unpack_pairs(source)
    if kind.name == _TWOS_COMPLEMENT_CODES:
        codes.bitwise_xor_(0x80)
    return GGMLTensor(
        type=kind,
        codes=codes.view(rows, in_features),
        scales=floats["scales"],
        sub_scales=_signed(sub_scales, kind, rows),
        mins=floats.get("mins"),
        sub_mins=None if sub_mins is None else sub_mins.to(torch.int16).view(rows, -1),
    )


def pack_plain(weight: Tensor, kind: GGMLType) -> Tensor:
    """The bytes of ``weight (..., in)`` rounded to F32, F16 or BF16: ``(..., bytes) uint8``.

    Raises:
        NumericalError: if F16 cannot hold a finite weight.
    """
    plain = weight.to(_PLAIN[kind.name]).contiguous()
    if kind.name == "F16" and bool((plain.isinf() & weight.isfinite()).any()):
        raise NumericalError(
            f"a weight of {float(weight.abs().max()):g} is beyond what F16 holds",
            "store this tensor as BF16 or F32",
        )
    return plain.view(torch.uint8)


def unpack_plain(data: Tensor, kind: GGMLType) -> Tensor:
    """``data (..., bytes) uint8`` as a tensor of the plain type, ``(..., in)``."""
    return data.contiguous().view(_PLAIN[kind.name])


def _pack_planes(values: Tensor, part: _Planes, target: Tensor) -> None:
    runs = values.view(len(values), part.groups, 8 // part.bits, part.width)
    out = target.view(len(values), part.groups, part.width)
    mask = (1 << part.bits) - 1
    for index in range(8 // part.bits):
        run = runs[:, :, index]
        if part.low:
            run = run >> part.low
        run = run if part.bits == 8 else (run & mask) << (index * part.bits)
        if index:
            out.bitwise_or_(run)
        else:
            out.copy_(run)


def _unpack_planes(source: Tensor, part: _Planes, values: Tensor) -> None:
    runs = values.view(len(values), part.groups, 8 // part.bits, part.width)
    stored = source.reshape(len(values), part.groups, part.width)
    mask = (1 << part.bits) - 1
    for index in range(8 // part.bits):
        run = (stored >> (index * part.bits)) & mask
        runs[:, :, index].bitwise_or_(run << part.low if part.low else run)


def _pack_six_bit(scales: Tensor, mins: Tensor) -> Tensor:
    high_scales, high_mins = scales[:, 4:], mins[:, 4:]
    first = scales[:, :4] | (high_scales >> 4 << 6)
    second = mins[:, :4] | (high_mins >> 4 << 6)
    return torch.cat([first, second, (high_scales & 15) | ((high_mins & 15) << 4)], dim=1)


def _unpack_six_bit(source: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = source[:, :4], source[:, 4:8], source[:, 8:]
    high_scales = (third & 15) | (first >> 6 << 4)
    high_mins = (third >> 4) | (second >> 6 << 4)
    return (
        torch.cat([first & 63, high_scales], dim=1),
        torch.cat([second & 63, high_mins], dim=1),
    )


def _pack_nibbles(scales: Tensor, mins: Tensor) -> Tensor:
    return scales | (mins << 4)


def _unpack_nibbles(source: Tensor) -> tuple[Tensor, Tensor]:
    return source & 15, source >> 4


def _stored(values: Tensor | None, kind: GGMLType, bias: int) -> Tensor | None:
    """Sub-scales as unsigned bytes, ``(blocks, sub-blocks)``."""
    if values is None:
        return None
    return ((values.reshape(-1, kind.sub_blocks) + bias) & 255).to(torch.uint8)


def _signed(values: Tensor | None, kind: GGMLType, rows: int) -> Tensor | None:
    if values is None:
        return None
    wide = values.view(rows, -1).to(torch.int16) - _SCALE_BIAS.get(kind.name, 0)
    if kind.name == "Q6_K":
        wide = ((wide + 128) & 255) - 128
    return wide


def _check_bytes(data: Tensor, row_bytes: int, kind: GGMLType) -> None:
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] != row_bytes:
        raise BadInputError(
            f"{data.dtype} of shape {tuple(data.shape)} are not rows of {row_bytes} bytes of "
            f"{kind.name}",
            "give uint8 of shape (out, bytes a row)",
        )
