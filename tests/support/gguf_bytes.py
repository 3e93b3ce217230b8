"""GGUF files spelled out byte by byte, without the writer under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + content


def entry(name: str | bytes, dimensions: Sequence[int], kind: int, offset: int) -> bytes:
    """`dimensions` as the file has them, the row's width first."""
    count = len(dimensions)
    return text(name) + struct.pack(f"<I{count}QIQ", count, *dimensions, kind, offset)


def gguf_file(
    pairs: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    num_tensors: int | None = None,
    num_values: int | None = None,
    alignment: int = 32,
) -> bytes:
    tensors = len(entries) if num_tensors is None else num_tensors
    values = len(pairs) if num_values is None else num_values
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values)
    head += b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + data


def sample() -> bytes:
    """A sound file: every metadata type, tensors of F32, Q4_0 and Q8_0 in three shapes."""
    pairs = [
        pair("general.architecture", 8, text("llama")),
        pair("n.u8", 0, b"\x07"),
        pair("n.i8", 1, struct.pack("<b", -7)),
        pair("n.u16", 2, struct.pack("<H", 700)),
        pair("n.i16", 3, struct.pack("<h", -700)),
        pair("n.u32", 4, struct.pack("<I", 70000)),
        pair("n.i32", 5, struct.pack("<i", -70000)),
        pair("n.f32", 6, struct.pack("<f", 0.5)),
        pair("n.bool", 7, b"\x01"),
        pair("n.u64", 10, struct.pack("<Q", 1 << 40)),
        pair("n.i64", 11, struct.pack("<q", -(1 << 40))),
        pair("n.f64", 12, struct.pack("<d", 0.25)),
        pair("a.text", 9, array(8, 3, text("a") + text("") + text("é"))),
        pair("a.i32", 9, array(5, 4, struct.pack("<4i", 1, -2, 3, -4))),
        pair("a.bool", 9, array(7, 2, b"\x00\x01")),
    ]
    entries = [
        entry("norm.weight", [5], 0, 0),
        entry("blk.0.weight", [64, 3], 2, 32),
        entry("blk.0.experts", [32, 2, 2], 8, 32 + 128),
    ]
    data = struct.pack("<5f", *range(5)) + bytes(12)
    data += bytes(range(108)) + bytes(20) + bytes(range(136))
    return gguf_file(pairs, entries, data)
