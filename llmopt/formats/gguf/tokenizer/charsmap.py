"""SentencePiece's precompiled character map, which rewrites a text before Unigram sees it.

Its layout (sentencepiece/src/normalizer.cc): ``uint32`` length of a double array in bytes, the
array of ``uint32`` units (Darts-clone), then zero-terminated replacements.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from llmopt.errors import BadInputError


@dataclass(frozen=True, slots=True)
class CharacterMap:
    """The longest prefix that the map knows is replaced, again and again.

    Attributes:
        units: of the double array; empty where nothing is replaced.
        replacements: zero-terminated UTF-8.
    """

    units: tuple[int, ...]
    replacements: bytes

    @staticmethod
    def parse(content: bytes) -> CharacterMap:
        """Read a map; no bytes are the map that changes nothing.

        Raises:
            BadInputError: the lengths in it do not agree.
        """
        if not content:
            return CharacterMap((), b"")
        num_bytes = struct.unpack_from("<I", content)[0] if len(content) >= 4 else 0
        if not num_bytes or num_bytes % 4 or 4 + num_bytes >= len(content):
            raise BadInputError(
                "the tokenizer's precompiled character map is damaged: its lengths do not agree",
                "take tokenizer.json from the model's publisher again",
            )
        units = struct.unpack_from(f"<{num_bytes // 4}I", content, 4)
        return CharacterMap(units, content[4 + num_bytes :])

    def apply(self, text: str) -> str:
        """Rewrite a text."""
        if not self.units:
            return text
        data, place, written = text.encode(), 0, bytearray()
        while place < len(data):
            length, replacement = self._longest(data, place)
            if not length:  # one character, unchanged
                length = 1
                while place + length < len(data) and data[place + length] & 0xC0 == 0x80:
                    length += 1
                replacement = data[place : place + length]
            written += replacement
            place += length
        return written.decode(errors="replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, bytes]:
        length, replacement = 0, b""
        node = _base(self.units[0])
        for place in range(start, len(data)):
            node ^= data[place]
            if node >= len(self.units) or self.units[node] & 0x800000FF != data[place]:
                break
            unit = self.units[node]
            node ^= _base(unit)
            if unit >> 8 & 1:
                at = self.units[node] & 0x7FFFFFFF
                length = place - start + 1
                replacement = self.replacements[at : self.replacements.index(b"\0", at)]
        return length, replacement


def _base(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)
