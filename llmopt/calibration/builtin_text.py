"""The built-in text: documents that need no download, split for training, calibration, evaluation.

Source: the help topics and docstrings of the running interpreter. A document is one help topic,
one long docstring, or the short docstrings of one module joined. The split follows a hash of the
module's or topic's name, so that it is the same for every Python version and every machine.
"""

import hashlib
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal, get_args

from llmopt.calibration.documents import Document
from llmopt.calibration.near_duplicates import drop_seen_paragraphs
from llmopt.calibration.stdlib_text import (
    Piece,
    extension_pieces,
    source_pieces,
    stdlib_folder,
    topic_pieces,
)
from llmopt.errors import BadInputError

Split = Literal["evaluation", "calibration", "train"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""In order of reading: a split is made without reading those after it, so measuring stays quick."""

OWN_DOCUMENT_CHARS = 1_000
MIN_DOCUMENT_CHARS = 200
MIN_SPLIT_CHARS = 100_000

CALIBRATION_SHARE = 0.17
EVALUATION_SHARE = 0.21
SPLIT_SALT = "llmopt-0"

TRAIN_ONLY = frozenset(
    ["tkinter", "idlelib", "turtle", "distutils", "ensurepip", "venv", "msilib", "asynchat",
     "asyncore", "smtpd", "imp", "aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr",
     "mailcap", "nntplib", "pipes", "sndhdr", "sunau", "telnetlib", "uu", "xdrlib", "curses",
     "posix", "fcntl", "grp", "pwd", "resource", "syslog", "termios", "__phello__", "__hello__"]
)  # fmt: skip
"""Packages that some distribution, platform or later version lacks: never used to measure."""


def split_of(unit: str) -> Split:
    """Return the split of a unit (``topic:<name>`` or ``module:<dotted name>``)."""
    kind, _, name = unit.partition(":")
    name = name.lstrip("_")  # C twins (`_datetime`) go where their Python module goes
    if kind == "module" and name.split(".")[0] in TRAIN_ONLY:
        return "train"
    digest = hashlib.sha256(f"{SPLIT_SALT}:{kind}:{name}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < CALIBRATION_SHARE:
        return "calibration"
    return "evaluation" if position < CALIBRATION_SHARE + EVALUATION_SHARE else "train"


def builtin_documents(split: Split) -> list[Document]:
    """Return the built-in documents of one split, in order of name.

    Raises:
        BadInputError: an unknown split, or an interpreter without its library sources.
    """
    if split not in SPLITS:
        raise BadInputError(f"unknown split {split!r}", f"use one of {', '.join(SPLITS)}")
    return list(_split_text(split).documents)


@dataclass(frozen=True, slots=True)
class _SplitText:
    documents: tuple[Document, ...]
    seen: frozenset[str]


@cache
def _split_text(split: Split) -> _SplitText:
    """Read one split; what repeats goes to the first split in SPLITS that has it."""
    place = SPLITS.index(split)
    seen = set(_split_text(SPLITS[place - 1]).seen) if place else set()

    def in_split(unit: str) -> bool:
        return split_of(unit) == split

    folder = stdlib_folder()
    pieces = chain(
        topic_pieces(in_split), extension_pieces(in_split), source_pieces(folder, in_split)
    )
    documents = _join_pieces(_first_occurrences(pieces, seen))
    by_name = tuple(sorted(documents, key=lambda document: document.name))
    if sum(len(document.text) for document in by_name) < MIN_SPLIT_CHARS:
        raise BadInputError(
            f"this Python carries too little text for {split} (library sources: {folder})",
            "use a Python with its .py sources, or give text files of your own",
        )
    return _SplitText(by_name, frozenset(seen))


def _first_occurrences(pieces: Iterable[Piece], seen: set[str]) -> Iterator[Piece]:
    """Yield the pieces without the paragraphs that ``seen`` has; add theirs to it."""
    for piece in pieces:
        text = drop_seen_paragraphs(piece.text, seen)
        if text:
            yield Piece(piece.unit, piece.heading, text)


def _join_pieces(pieces: Iterable[Piece]) -> Iterator[Document]:
    """Yield one document per long piece, and one per unit for its short pieces together."""
    short: dict[str, list[str]] = {}
    own_names: set[str] = set()
    for piece in pieces:
        body = f"{piece.heading}\n\n{piece.text}" if piece.heading else piece.text
        name = f"{piece.unit}#{piece.heading.partition('(')[0]}".rstrip("#")
        if len(piece.text) > OWN_DOCUMENT_CHARS and name not in own_names:
            own_names.add(name)
            yield Document(name, body)
        else:
            short.setdefault(piece.unit, []).append(body)
    for unit, bodies in short.items():
        text = "\n\n".join(bodies)
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield Document(unit if unit not in own_names else f"{unit}#rest", text)


def split_sha256(documents: Iterable[Document]) -> str:
    """Return one hex digest over names and texts, in the given order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.sha256}\n".encode())
    return digest.hexdigest()


def text_fingerprint() -> dict[str, str]:
    """Return the Python version and each split's sha256, as a report records them."""
    hashes: dict[str, str] = {split: split_sha256(builtin_documents(split)) for split in SPLITS}
    return {"python": platform.python_version(), **hashes}
