"""Small tokenizers of every kind that a GGUF file can hold, trained on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
OTHER_SCRIPTS = """
Привет, как дела? Ελληνικά κείμενα. שלום עולם! مرحبا بالعالم. हिन्दी में लिखा हुआ
你好，世界。今天天气很好！ 東京は日本の首都です。カタカナ 한국어 텍스트입니다
naïve café Ünïcödé ÉCOLE Straße Ørsted fiancée 🙂🙂 👍🏽 “quotes” — dashes…
1 22 333 4444 1,234,567.89 2024-11-21 x = [1, 2, 3]; if (a >= b) { return c; }  // comment
"""


@cache
def training_text() -> tuple[str, ...]:
    """English, code and other scripts, a line each."""
    folder = Path(__file__).resolve().parents[2]
    files = [folder / "README.md", folder / "CONTRIBUTING.md", *sorted(folder.glob("llmopt/*.py"))]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return (*lines[::2], *OTHER_SCRIPTS.splitlines() * 20)


def byte_level(
    steps: Sequence[pre_tokenizers.PreTokenizer] = (),
    *,
    use_regex: bool = False,
    size: int = 900,
    special: Sequence[str] = (END,),
) -> Tokenizer:
    """Byte-level BPE that cuts by ``steps``, then, where ``use_regex``, as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return tokenizer


def isolating(expression: str) -> pre_tokenizers.PreTokenizer:
    """A step that makes a word of each match."""
    return pre_tokenizers.Split(Regex(expression), "isolated")


def sentencepiece(prefix: str, *, size: int = 1200, complete: bool = True) -> Tokenizer:
    """BPE with byte fallback, as converters make it of a SentencePiece model.

    Args:
        prefix: ``prepend`` (as Llama 2's file), ``metaspace`` (as transformers' class) or ``none``
            (as Gemma's).
        size: of the vocabulary.
        complete: give it a merge for every two tokens that spell a third, as converters do.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    _mark_spaces(trained, "prepend")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=12,
        show_progress=False,
    )
    words = (word for line in training_text() for word in line.split(" "))
    trained.train_from_iterator(words, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"]
    merges = _all_merges(vocabulary) if complete else [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    _mark_spaces(tokenizer, prefix)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


def _mark_spaces(tokenizer: Tokenizer, prefix: str) -> None:
    escape = normalizers.Replace(" ", "▁")
    end: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)]
    if prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape])
    elif prefix == "none":
        tokenizer.normalizer = escape
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        end = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )


def _all_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    pieces = {text for text, index in vocabulary.items() if index >= 259}
    merges = []
    for text in sorted(pieces, key=lambda text: vocabulary[text]):
        pairs = [(text[:place], text[place:]) for place in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def unigram(*, size: int = 1200, charsmap: bytes = b"") -> Tokenizer:
    """Unigram, with T5's steps before it where a character map is given."""
    tokenizer = Tokenizer(models.Unigram())
    if charsmap:
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Precompiled(charsmap),
                normalizers.Strip(left=False, right=True),
                normalizers.Replace(Regex(" {2,}"), "▁"),
            ]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]  # SentencePiece's are float32
    tokenizer.model = models.Unigram(
        [(piece, float(np.float32(score))) for piece, score in vocabulary], 2, False
    )
    return tokenizer


def character_map(replacements: dict[str, str]) -> bytes:
    """SentencePiece's map of single bytes to texts: a double array with all labels in one row."""
    units, texts = [0] * 1024, b""
    units[0] = 256 << 10
    for char, text in replacements.items():
        (byte,) = char.encode()
        units[256 ^ byte] = byte | 1 << 8 | 512 << 10
        units[256 ^ byte ^ 512] = len(texts) | 1 << 31
        texts += text.encode() + b"\0"
    return struct.pack("<I1024I", 4096, *units) + texts


def save(tokenizer: Tokenizer, folder: Path, **names: object) -> Path:
    """Write a tokenizer's folder; ``names`` as PreTrainedTokenizerFast takes them."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": END} | names))
    fast.save_pretrained(folder)
    return folder


def lines(texts: Iterable[str], count: int) -> list[str]:
    """Some hundred lines, evenly chosen, none empty."""
    filled = [text for text in texts if text.strip()]
    return filled[:: max(1, len(filled) // count)][:count]
