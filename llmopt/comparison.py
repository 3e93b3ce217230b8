"""A candidate on disk beside the model it came from: whether both can be compared at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.calibration.tokenizer import PROBE_TEXT, encode, load_tokenizer
from llmopt.checkpoint.reader import CheckpointReader
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import BadInputError
from llmopt.formats.config_file import quantization_config
from llmopt.formats.dequantized import DequantizedSource
from llmopt.formats.gguf.source import GGUFSource
from llmopt.formats.kv_cache import read_cache
from llmopt.kv_cache.reading import KVCache
from llmopt.quantization.ggml.types import GGMLType
from llmopt.quantization.scheme import Scheme
from llmopt.spilled import RowReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNQUANTIZED_BITS = 8
"""An unquantized candidate is held to the strictest margins there are."""

_REMEDY = "compare a model with the very checkpoint it was made from"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate on disk and all that judging it needs.

    Attributes:
        reader: the source checkpoint.
        structure: of the source.
        path: of the candidate: its folder or file.
        candidate: its weights, under the names that ``candidate_structure`` knows.
        candidate_structure: of the candidate, from its own ``config.json``, or metadata.
        schemes: by the source's tensor names; none if the candidate is not quantized.
        tables: of the candidate, embedding and head where reading them dequantizes them; gives
            some of their rows.
        is_plain_rounding: whether the candidate is its own yardstick of the relative criterion.
        bits: the width that most of the quantized parameters have; it decides the margins.
        tokenizer: the source's.
        kv_cache: the candidate's, if it is quantized; the source's is 16-bit.
    """

    reader: CheckpointReader
    structure: ModelStructure
    path: Path
    candidate: TensorSource
    candidate_structure: ModelStructure
    schemes: Mapping[str, Scheme | GGMLType]
    tables: Mapping[str, RowReader]
    is_plain_rounding: bool
    bits: int
    tokenizer: PreTrainedTokenizerBase
    kv_cache: KVCache | None = None


def margin_bits(sizes: Iterable[tuple[int, int]]) -> int:
    """The bit width that most of the quantized parameters have, the wider one of two equals.

    ``sizes`` are pairs of a width and how many parameters have it.
    """
    parameters: Counter[int] = Counter()
    for width, num_parameters in sizes:
        parameters[width] += num_parameters
    return max(parameters, key=lambda bits: (parameters[bits], bits))


def compare(candidate: CheckpointReader, reader: CheckpointReader) -> Comparison:
    """Set a model on disk beside its source.

    The candidate is what its own files say: its config decides how it computes.

    Raises:
        BadInputError: tensors that are missing, surplus or of another shape than the source's,
            another vocabulary, or a tokenizer that gives other tokens.
    """
    structure = read_structure(reader)
    tokenizer = load_tokenizer(reader.path).tokenizer
    quantized = quantization_config(candidate) is not None
    source = DequantizedSource(candidate) if quantized else candidate
    own = read_structure(source)
    _check_same_model(candidate.path, source, own, reader, structure)
    _check_same_tokens(candidate.path, tokenizer)
    schemes: dict[str, Scheme | GGMLType] = {}
    bits = UNQUANTIZED_BITS
    if isinstance(source, DequantizedSource):
        schemes = {f"{m}.weight": source.scheme_of(m) for m in source.quantized_modules}
        sizes = [(schemes[name].bits, source.info(name).num_parameters) for name in schemes]
        bits = margin_bits(sizes)
    return Comparison(
        reader,
        structure,
        candidate.path,
        source,
        own,
        schemes,
        {},
        False,
        bits,
        tokenizer,
        read_cache(candidate.config, candidate, own),
    )


def compare_gguf(path: Path, reader: CheckpointReader) -> Comparison:
    """Set a GGUF file, of llmopt's or another's making, beside its source.

    Raises:
        BadInputError: a file that cannot be read or is of another model; tokens of other texts.
    """
    structure = read_structure(reader)
    tokenizer = load_tokenizer(reader.path).tokenizer
    source = GGUFSource(path)
    own = read_structure(source)
    _check_same_shapes(path, source, own, reader, structure)
    _check_same_vocabulary(path, source, tokenizer)
    memory_names = {disk: memory for memory, disk in own.disk_names.items()}
    schemes: dict[str, Scheme | GGMLType] = {}
    sizes = []
    for module in source.quantized_modules:
        name = f"{module}.weight"
        kind = source.scheme_of(module)
        sizes.append((kind.bits, source.info(name).num_parameters))
        disk_name = structure.disk_names.get(memory_names[name])
        if disk_name is not None:  # a head may stand in the file that the source ties
            schemes[disk_name] = kind
    tables = {own.embed_disk_name, own.head_disk_name} - {None}
    return Comparison(
        reader,
        structure,
        path,
        source,
        own,
        schemes,
        {name: partial(source.read_rows, name) for name in tables if name is not None},
        False,
        margin_bits(sizes) if sizes else UNQUANTIZED_BITS,
        tokenizer,
    )


def _check_same_shapes(
    path: Path,
    source: GGUFSource,
    own: ModelStructure,
    reader: CheckpointReader,
    structure: ModelStructure,
) -> None:
    """By the names that transformers' model has: a file has names of its own."""
    head = f"{structure.anatomy.head}.weight"
    optional = {head} if structure.tied_head else set()
    theirs, ours = set(structure.disk_names) - optional, set(own.disk_names) - optional
    for names, word in ((theirs - ours, "lacks"), (ours - theirs, "adds")):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise BadInputError(f"{path} {word} {len(names)} tensors, for example {some}", _REMEDY)
    for name in sorted(theirs):
        mine, other = source.info(own.disk_name(name)), reader.info(structure.disk_name(name))
        if mine.shape != other.shape:
            raise BadInputError(
                f"{name} is {list(mine.shape)} in {path}, {list(other.shape)} in the source",
                _REMEDY,
            )


def _check_same_vocabulary(
    path: Path, source: GGUFSource, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = source.file.metadata.get("tokenizer.ggml.tokens")
    remedy = "compare it with its own source, or convert it anew"
    if not isinstance(texts, tuple):
        raise BadInputError(f"{path} has no tokens (tokenizer.ggml.tokens)", remedy)
    for text, index in tokenizer.get_vocab().items():
        # Some converters write added tokens as they are read, SentencePiece's mark as a space.
        if index < len(texts) and texts[index] not in (text, text.replace("\u2581", " ")):
            raise BadInputError(
                f"token {index} is {texts[index]!r} in {path}, {text!r} in the source", remedy
            )


def _check_same_model(
    path: Path,
    source: TensorSource,
    own: ModelStructure,
    reader: CheckpointReader,
    structure: ModelStructure,
) -> None:
    theirs, ours = set(reader.names), set(source.names)
    if structure.tied_head and structure.head_disk_name is not None:
        theirs.discard(structure.head_disk_name)
        ours.discard(structure.head_disk_name)
    for names, word in ((theirs - ours, "lacks"), (ours - theirs, "adds")):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise BadInputError(f"{path} {word} {len(names)} tensors, for example {some}", _REMEDY)
    for name in sorted(theirs):
        mine, other = source.info(name).shape, reader.info(name).shape
        if tuple(mine) != tuple(other):
            raise BadInputError(
                f"{name} is {list(mine)} in {path}, {list(other)} in the source", _REMEDY
            )
    if own.vocabulary_size != structure.vocabulary_size:
        raise BadInputError(
            f"{path} has {own.vocabulary_size} logits, the source {structure.vocabulary_size}",
            _REMEDY,
        )


def _check_same_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    own = load_tokenizer(path).tokenizer
    if encode([PROBE_TEXT], own) != encode([PROBE_TEXT], tokenizer):
        raise BadInputError(
            f"the tokenizer of {path} gives other tokens than the source's on a probe text",
            "copy the source's tokenizer files into it",
        )
