"""Where text comes from: a file, a data set of the Hugging Face hub, or the built-in text.

Every source ends as a list of documents. Rows that are conversations go through the tokenizer's
chat template, because a chat model's activations on bare text are not those it serves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llmopt.calibration.builtin_text import Split, builtin_documents
from llmopt.calibration.conversation import ROW_KINDS, ChatTokenizer, row_text
from llmopt.calibration.documents import Document
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BUILTIN = "builtin"
MIN_PARAGRAPH_CHARS = 1_000
"""Paragraphs of a ``.txt`` are joined up to this: about 256 tokens, the gate's smallest unit."""

DATA_EXTRA = 'pip install "llmopt[data]"'
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_SPLIT = re.compile(r"(train|validation|valid|dev|test)\w*(\[.*\])?")

Row = Mapping[str, object]


def read_documents(
    source: str | Path,
    *,
    split: Split = "calibration",
    tokenizer: ChatTokenizer | None = None,
    max_documents: int | None = None,
) -> list[Document]:
    """Read all documents of ``source``, in its order.

    Args:
        source: ``builtin``; a path ending in ``.txt``, ``.jsonl`` or ``.parquet``; or a data set,
            ``hf:owner/name[:config][:split]`` or plainly ``owner/name`` (split ``train``).
        split: which part of the built-in text; other sources are whole (``split_documents``).
        tokenizer: applies its chat template to rows that are conversations.
        max_documents: stop after so many; a data set is then streamed instead of downloaded
            (except a slice of one, which the hub client cannot stream).

    Raises:
        BadInputError: source missing, of unknown kind, empty or unreadable (with the row), no
            usable column (with those there are), conversations without a chat template.
    """
    text = str(source)
    if text == BUILTIN:
        found = iter(builtin_documents(split))
    elif is_data_set(source):
        name = text.removeprefix("hf:")
        found = _hub_documents(name, tokenizer, streaming=max_documents is not None)
    elif _is_file(source):
        found = _file_documents(Path(source), tokenizer)
    else:
        raise BadInputError(f"text source {text!r} is neither a file nor a data set", _SOURCES)
    documents = list(islice(found, max_documents))
    if not documents:
        raise BadInputError(f"text source {text!r} holds no text", "give a source with text in it")
    return documents


def is_data_set(source: str | Path) -> bool:
    """Whether ``source`` names a data set of the hub; a file of the same name goes first."""
    text = str(source)
    if text.startswith("hf:"):
        return True
    looks_so = re.match(r"[\w.-]+/[\w.-]+(:|$)", text) and not Path(text).suffix
    return bool(looks_so) and not _is_file(source)


def same_source(first: str | Path, second: str | Path) -> bool:
    """Whether two sources are one text, however their names are written."""
    return _identity(first) == _identity(second)


def _identity(source: str | Path) -> tuple[str | None, ...]:
    if str(source) == BUILTIN:
        return (BUILTIN,)
    if is_data_set(source):
        return ("data set", *parse_hub_name(str(source).removeprefix("hf:")))
    return ("file", str(Path(source).resolve()))


def _is_file(source: str | Path) -> bool:
    return Path(source).suffix in _READERS or Path(source).exists()


_SOURCES = (
    "give a .txt, .jsonl or .parquet file, a data set as hf:owner/name[:config][:split], or "
    f"{BUILTIN!r}"
)


def _file_documents(path: Path, tokenizer: ChatTokenizer | None) -> Iterator[Document]:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise BadInputError(f"text file {path} {what}", _SOURCES)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise BadInputError(
            f"text file {path} has the unknown suffix {path.suffix!r}",
            f"use one of {', '.join(_READERS)}",
        )
    if path.stat().st_size == 0:
        raise BadInputError(f"text file {path} is empty", "give a file with text in it")
    return reader(path, tokenizer)


def _text_documents(path: Path, tokenizer: ChatTokenizer | None) -> Iterator[Document]:
    for index, text in enumerate(join_paragraphs(_decode(path.read_bytes(), str(path)))):
        yield Document(f"{path.name}#{index}", text)


def join_paragraphs(text: str, min_chars: int = MIN_PARAGRAPH_CHARS) -> list[str]:
    """Cut ``text`` at blank lines and join neighbours until each part has ``min_chars``.

    The last part may be shorter.
    """
    parts: list[str] = []
    pending: list[str] = []
    for paragraph in re.split(r"\n[^\S\n]*\n\s*", text.replace("\r\n", "\n").strip()):
        if paragraph.strip():
            pending.append(paragraph)
        if sum(map(len, pending)) >= min_chars:
            parts.append("\n\n".join(pending))
            pending = []
    return [*parts, "\n\n".join(pending)] if pending else parts


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{where} is not UTF-8 (byte {error.start})", "convert the file to UTF-8"
        ) from error


def _jsonl_documents(path: Path, tokenizer: ChatTokenizer | None) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise BadInputError(
                    f"{where} is not JSON ({error.msg}, column {error.colno})",
                    "put one JSON object on each line",
                ) from error
            if not isinstance(row, dict):
                raise BadInputError(f"{where} is not a JSON object", f"use {ROW_KINDS}")
            yield from _row_documents(row, f"{path.name}:{number}", where, tokenizer)


def _parquet_documents(path: Path, tokenizer: ChatTokenizer | None) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BadInputError(f"{path}: reading parquet needs pyarrow", DATA_EXTRA) from error
    try:
        file: ParquetFile = pq.ParquetFile(path)
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield from _row_documents(
                row, f"{path.name}:{number}", f"{path} row {number}", tokenizer
            )
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(
            f"{path} is not readable parquet ({error})", "check the file"
        ) from error


def _row_documents(
    row: Row, name: str, where: str, tokenizer: ChatTokenizer | None
) -> Iterator[Document]:
    # Data sets made of lines (WikiText) hold blank rows: no document, and no error either.
    text = row_text(row, where, tokenizer)
    if text.strip():
        yield Document(name, text)


_Reader = Callable[[Path, ChatTokenizer | None], Iterator[Document]]
_READERS: dict[str, _Reader] = {
    ".txt": _text_documents,
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}


def parse_hub_name(source: str) -> tuple[str, str | None, str]:
    """Read ``owner/name[:config][:split]`` as (name, config or ``None``, split).

    A single part after the name is a split if it begins like one (``train``, ``validation``,
    ``test``), a config otherwise; the default split is ``train``.
    """
    name, *rest = source.split(":", 2) if "[" not in source else _split_before_slice(source)
    if not _HUB_NAME.fullmatch(name) or "" in rest:
        raise BadInputError(f"data set {source!r} is not of the form owner/name", _SOURCES)
    if len(rest) == 2:
        return name, rest[0], rest[1]
    if rest and not _HUB_SPLIT.fullmatch(rest[0]):
        return name, rest[0], "train"
    return name, None, rest[0] if rest else "train"


def _split_before_slice(source: str) -> list[str]:
    head, bracket, slice_ = source.partition("[")
    parts = head.split(":", 2)
    return [*parts[:-1], parts[-1] + bracket + slice_]


def _hub_documents(
    source: str, tokenizer: ChatTokenizer | None, *, streaming: bool
) -> Iterator[Document]:
    name, config, split = parse_hub_name(source)
    try:
        import datasets
    except ImportError as error:
        raise BadInputError(f"data set {name}: needs the datasets package", DATA_EXTRA) from error
    remedy = (
        "check name, config and split, and the connection to the hub (HF_ENDPOINT, HF_TOKEN for "
        "gated ones); without a network use a local .txt, .jsonl or .parquet, or 'builtin'"
    )
    try:
        streaming = streaming and "[" not in split
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for number, row in enumerate(cast("Sequence[Row]", rows)):
            yield from _row_documents(row, f"{name}:{number}", f"{name} row {number}", tokenizer)
    except BadInputError:
        raise
    except Exception as error:  # the hub client raises its own, OSErrors and its transport's
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInputError(f"data set {source} could not be read: {first_line}", remedy) from error
