"""llama.cpp's tokenizers, written again from what they do, to compare a tokenizer with.

Three algorithms: byte-level BPE after a chain of regular expressions (``gpt2``), SentencePiece's
BPE driven by scores (``llama``), and its Unigram by Viterbi (``t5``). Before each of them the
texts of control, user-defined and unknown tokens are cut out, longest first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import regex

from llmopt.formats.gguf.tokenizer.charsmap import CharacterMap
from llmopt.formats.gguf.tokenizer.vocabulary import TokenType, Vocabulary

SPACE = "▁"
Tokenize = Callable[[str], list[int]]
"""A text without special tokens to ids; told nothing of what stands beside it."""


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in byte-level BPE (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(shifted)) for byte in range(256)]


_BYTE_CHARACTERS = byte_characters()


def compile_splits(expressions: Sequence[str]) -> tuple[regex.Pattern[str], ...]:
    r"""Compile a chain of expressions; ``\s`` is Unicode's White_Space, as llama.cpp has it."""
    return tuple(
        regex.compile(
            expression.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        )
        for expression in expressions
    )


def split_words(text: str, chain: Sequence[regex.Pattern[str]]) -> list[str]:
    """Cut a text by one expression after the other: matches and what lies between them."""
    words = [text]
    for expression in chain:
        words = [piece for word in words for piece in _cut(word, expression)]
    return words


def _cut(word: str, expression: regex.Pattern[str]) -> list[str]:
    pieces, place = [], 0
    for match in expression.finditer(word):
        pieces += [word[place : match.start()], match.group()]
        place = match.end()
    pieces.append(word[place:])
    return [piece for piece in pieces if piece]


def to_byte_characters(text: str) -> str:
    """A text's UTF-8 bytes, each as its character."""
    return "".join(_BYTE_CHARACTERS[byte] for byte in text.encode())


def join_symbols(word: str, priority: Callable[[str, str], float | None]) -> list[str]:
    """Join neighbours, the pair of lowest priority first and of equals the leftmost.

    Args:
        word: its characters are what is joined.
        priority: of a pair; ``None`` where it is never joined.
    """
    texts = list(word)
    before = list(range(-1, len(texts) - 1))
    after = [*range(1, len(texts)), -1]
    queue: list[tuple[float, int, int, str]] = []

    def consider(left: int, right: int) -> None:
        if left < 0 or right < 0:
            return
        rank = priority(texts[left], texts[right])
        if rank is not None:
            heapq.heappush(queue, (rank, left, right, texts[left] + texts[right]))

    for index in range(1, len(texts)):
        consider(index - 1, index)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not texts[left] or not texts[right] or texts[left] + texts[right] != joined:
            continue  # one of them was joined elsewhere since
        texts[left], texts[right] = joined, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        consider(before[left], left)
        consider(left, after[left])
    return [text for text in texts if text]


def byte_level_bpe(
    vocabulary: Vocabulary,
    merges: Sequence[tuple[str, str]],
    chain: Sequence[regex.Pattern[str]],
    *,
    ignore_merges: bool,
) -> Tokenize:
    """llama.cpp's ``gpt2`` model.

    Args:
        vocabulary: its tokens.
        merges: best first.
        chain: the expressions of its pre-tokenizer.
        ignore_merges: a word that is a token is not joined from its characters.
    """
    ids = vocabulary.ids
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}

    def tokenize(text: str) -> list[int]:
        found: list[int] = []
        for word in map(to_byte_characters, split_words(text, chain)):
            if ignore_merges and word in ids:
                found.append(ids[word])
                continue
            symbols = join_symbols(word, lambda left, right: ranks.get((left, right)))
            # A symbol that is no token is looked up byte by byte, which finds ASCII only.
            for symbol in symbols:
                parts = [symbol] if symbol in ids else [char for char in symbol if char < "\x80"]
                found += [ids[part] for part in parts if part in ids]
        return found

    return tokenize


def sentencepiece_bpe(vocabulary: Vocabulary, scores: Sequence[float]) -> Tokenize:
    """llama.cpp's ``llama`` model: any two neighbours that spell a token join, best score first."""
    ids = vocabulary.ids

    def priority(left: str, right: str) -> float | None:
        index = ids.get(left + right)
        return None if index is None else -scores[index]

    def tokenize(text: str) -> list[int]:
        found: list[int] = []
        for symbol in join_symbols(text.replace(" ", SPACE), priority):
            if symbol in ids:
                found.append(ids[symbol])
            else:
                found += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return found

    return tokenize


def unigram(
    vocabulary: Vocabulary,
    scores: Sequence[float],
    unknown: int,
    characters: CharacterMap,
    *,
    add_space_prefix: bool,
    merge_spaces: bool,
) -> Tokenize:
    """llama.cpp's ``t5`` model: the best-scoring way to spell a text by tokens."""
    normal = vocabulary.of_type(TokenType.NORMAL)
    usable = vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    user_defined = set(vocabulary.of_type(TokenType.USER_DEFINED))
    pieces = {
        vocabulary.texts[index]: (index, 0.0 if index in user_defined else scores[index])
        for index in usable
    }
    longest = max(map(len, pieces))
    unknown_score = min(scores[index] for index in normal) - 10

    def tokenize(text: str) -> list[int]:
        text = _unigram_spaces(characters.apply(text), add_space_prefix, merge_spaces)
        best: list[tuple[float, int, int]] = [(0.0, 0, unknown)]
        best += [(float("-inf"), 0, unknown)] * len(text)
        for start in range(len(text)):
            for end in range(start + 1, min(start + longest, len(text)) + 1):
                piece = pieces.get(text[start:end])
                if piece is not None and best[start][0] + piece[1] > best[end][0]:
                    best[end] = (best[start][0] + piece[1], start, piece[0])
            if text[start] not in pieces and best[start][0] + unknown_score > best[start + 1][0]:
                best[start + 1] = (best[start][0] + unknown_score, start, unknown)
        return _read_back(best, unknown)

    return tokenize


def _unigram_spaces(text: str, add_space_prefix: bool, merge_spaces: bool) -> str:
    written, in_word, prefixed = "", False, False
    for char in text:
        if char != " ":
            if not in_word and ((add_space_prefix and not prefixed) or merge_spaces):
                written, prefixed = written + SPACE, True
            written, in_word = written + char, True
        else:
            in_word = False
            written += "" if merge_spaces else SPACE
    return written


def _read_back(best: Sequence[tuple[float, int, int]], unknown: int) -> list[int]:
    found: list[int] = []
    place = len(best) - 1
    while place > 0:
        _, start, index = best[place]
        if not (index == unknown and found and found[-1] == unknown):
            found.append(index)
        place = start
    return found[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """A whole tokenizer of llama.cpp: special tokens cut out, the rest given to its model.

    Attributes:
        tokenize: the model.
        special: id of each text that is cut out, longest first.
        space_prefix: whether a space is put before a text that follows nothing or a special token.
    """

    tokenize: Tokenize
    special: Mapping[str, int]
    space_prefix: bool

    @staticmethod
    def of(vocabulary: Vocabulary, tokenize: Tokenize, *, space_prefix: bool = False) -> Engine:
        """An engine of these tokens; control, user-defined and unknown ones are special."""
        kinds = TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN
        texts = {vocabulary.texts[index]: index for index in vocabulary.of_type(*kinds)}
        order = sorted(texts, key=lambda text: -len(text.encode()))
        return Engine(tokenize, {text: texts[text] for text in order}, space_prefix)

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens in the text recognised, nothing put around it."""
        fragments: list[str | int] = [text] if text else []
        for special, index in self.special.items():
            if special in text:
                fragments = [
                    part for piece in fragments for part in _cut_out(piece, special, index)
                ]
        found: list[int] = []
        after_special = True
        for fragment in fragments:
            if isinstance(fragment, int):
                found.append(fragment)
                after_special = True
            else:
                prefix = " " if self.space_prefix and after_special else ""
                found += self.tokenize(prefix + fragment)
                after_special = False
        return found


def _cut_out(fragment: str | int, special: str, index: int) -> list[str | int]:
    if isinstance(fragment, int):
        return [fragment]
    parts: list[str | int] = []
    for place, text in enumerate(fragment.split(special)):
        parts += [index] if place else []
        parts += [text] if text else []
    return parts
