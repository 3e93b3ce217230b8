"""What stands at a path: a checkpoint, an artifact, or a single safetensors file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from llmopt.checkpoint.placement import companion_folder
from llmopt.checkpoint.reader import CheckpointReader, MappedFile, open_checkpoint
from llmopt.checkpoint.tensor_source import TensorInfo
from llmopt.errors import BadInputError
from llmopt.formats.config_file import quantization_config
from llmopt.formats.dequantized import DequantizedSource
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.header import MAGIC
from llmopt.formats.gguf.record import (
    TENSOR_DATA_KEY,
    VERDICT_KEY,
    has_intact_tensors,
    read_verdict,
)
from llmopt.report.inspection import Inspection, TensorLine
from llmopt.report.integrity import changed_files, changed_gguf
from llmopt.report.json_file import read_json
from llmopt.report.schema import JSON_NAME

_MAX_TEXT = 60


def inspect_path(path: Path | str) -> Inspection:
    """Look at a folder, a ``.safetensors`` file or a GGUF file of any tool.

    Of tensors only the headers are read and one packed layer of every scheme, but every file of an
    artifact is hashed, weights too, to tell whether it is as it was gated. The schemes of a
    checkpoint that another tool quantized are left empty where llmopt does not read them.

    Raises:
        BadInputError: nothing there, or nothing that llmopt reads.
    """
    path = Path(path)
    if path.is_file():
        return _inspect_file(path)
    reader = open_checkpoint(path)
    report_file = path / JSON_NAME
    report = read_json(report_file) if report_file.is_file() else None
    quantized = quantization_config(reader)
    schemes, unread = _schemes(reader) if quantized else ({}, None)
    return Inspection(
        path=path,
        kind="artifact" if report else "checkpoint",
        tensors=_lines((name, reader.info(name)) for name in reader.names),
        architecture=_architecture(reader.config),
        format=str(quantized.get("quant_method")) if quantized else None,
        schemes=schemes,
        unread=unread,
        report=report,
        changed=tuple(changed_files(path, report)) if report else (),
    )


def _architecture(config: Mapping[str, JsonValue]) -> str:
    named = config.get("architectures")
    return str(named[0] if isinstance(named, list) and named else config.get("model_type"))


def _inspect_file(path: Path) -> Inspection:
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) == MAGIC:
            return _inspect_gguf(path)
    if path.suffix != ".safetensors":
        raise BadInputError(
            f"{path} is neither a .safetensors nor a GGUF file",
            "give a model folder, a .safetensors file or a GGUF file",
        )
    file = MappedFile(path)
    return Inspection(
        path=path, kind="file", tensors=_lines((name, file.info(name)) for name in file.places)
    )


def _inspect_gguf(path: Path) -> Inspection:
    file = GGUFFile(path)
    report_file = companion_folder(path) / JSON_NAME
    report = read_json(report_file) if report_file.is_file() else None
    verdict = read_verdict(file)
    intact = has_intact_tensors(path) if TENSOR_DATA_KEY in file.metadata else None
    infos = [file.info(name) for name in file.names]
    matrices = Counter(info.type.name for info in infos if not info.type.is_plain)
    return Inspection(
        path=path,
        kind="GGUF file",
        tensors=tuple(TensorLine(i.name, i.type.name, i.shape, i.num_bytes) for i in infos),
        architecture=str(file.metadata.get("general.architecture", "unknown")),
        format="gguf",
        schemes=dict(matrices.most_common()),
        report=report,
        changed=tuple(changed_gguf(path, report)) if report else (),
        metadata=dict(_metadata(file)),
        verdict=None if verdict is None else _own_words(verdict, intact),
        intact=intact,
    )


def _own_words(verdict: Mapping[str, JsonValue], intact: bool | None) -> str:
    outcome = str(verdict.get("outcome", "not judged"))
    return f"{outcome}, of other tensors than it holds now" if intact is False else outcome


def _metadata(file: GGUFFile) -> Iterator[tuple[str, str]]:
    """Every value, in a line each; the two records of llmopt's have lines of their own."""
    for key, value in file.metadata.items():
        if key in (TENSOR_DATA_KEY, VERDICT_KEY):
            continue
        if isinstance(value, str):
            line = " ".join(value.split())
            yield key, line if len(line) <= _MAX_TEXT else f"{line[:_MAX_TEXT]}… ({len(value)})"
        elif isinstance(value, bool | int | float):
            yield key, f"{value:.7g}" if isinstance(value, float) else str(value)
        else:
            yield key, f"{len(value):,} values"


def _lines(tensors: Iterable[tuple[str, TensorInfo]]) -> tuple[TensorLine, ...]:
    return tuple(
        TensorLine(name, str(info.dtype).removeprefix("torch."), info.shape, info.num_bytes)
        for name, info in tensors
    )


def _schemes(reader: CheckpointReader) -> tuple[dict[str, int], str | None]:
    """Quantized layers by scheme, or none and why they cannot be read.

    Of every scheme one layer is unpacked: a config whose bits are not those of the codes shows.
    """
    counts: Counter[str] = Counter()
    try:
        source = DequantizedSource(reader)
        for module in source.quantized_modules:
            scheme = source.scheme_of(module)
            if scheme.label not in counts:
                source.read_quantized(module)
            counts[scheme.label] += 1
    except BadInputError as error:
        return {}, error.what
    return dict(counts), None
