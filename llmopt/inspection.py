"""What stands at a path: a checkpoint, an artifact, or a single safetensors file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue

from llmopt.checkpoint.reader import CheckpointReader, MappedFile, open_checkpoint
from llmopt.checkpoint.tensor_source import TensorInfo
from llmopt.errors import BadInputError
from llmopt.formats.config_file import quantization_config
from llmopt.formats.dequantized import DequantizedSource
from llmopt.report.inspection import Inspection, TensorLine
from llmopt.report.integrity import changed_files
from llmopt.report.json_file import read_json
from llmopt.report.schema import JSON_NAME


def inspect_path(path: Path | str) -> Inspection:
    """Look at a folder or a ``.safetensors`` file.

    Of tensors only the headers are read, but every file of an artifact is hashed, weights too, to
    tell whether it is as it was gated. The schemes of a checkpoint that another tool quantized
    are left empty where llmopt does not read them.

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
    if path.suffix != ".safetensors":
        raise BadInputError(
            f"{path} is not a .safetensors file", "give a model folder or a .safetensors file"
        )
    file = MappedFile(path)
    return Inspection(
        path=path, kind="file", tensors=_lines((name, file.info(name)) for name in file.places)
    )


def _lines(tensors: Iterable[tuple[str, TensorInfo]]) -> tuple[TensorLine, ...]:
    return tuple(
        TensorLine(name, str(info.dtype).removeprefix("torch."), info.shape, info.num_bytes)
        for name, info in tensors
    )


def _schemes(reader: CheckpointReader) -> tuple[dict[str, int], str | None]:
    """Quantized layers by scheme, or none and why they cannot be read."""
    try:
        source = DequantizedSource(reader)
        counts = Counter(source.scheme_of(module).label for module in source.quantized_modules)
    except BadInputError as error:
        return {}, error.what
    return dict(counts), None
