"""Where a quantized checkpoint says how it is quantized: its own files or those of its tool."""

from __future__ import annotations

from pydantic import JsonValue

from llmopt.checkpoint.checks import read_json_object
from llmopt.checkpoint.reader import CheckpointReader
from llmopt.errors import BadInputError

# auto-gptq and AutoAWQ, before transformers took the section into config.json.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def quantization_config(reader: CheckpointReader) -> dict[str, JsonValue] | None:
    """The checkpoint's ``quantization_config``, or ``None`` if it is not quantized.

    It stands in ``config.json`` (``compression_config`` in old compressed-tensors), or alone in
    ``quantize_config.json`` (auto-gptq) or ``quant_config.json`` (AutoAWQ).

    Raises:
        BadInputError: if it is no mapping, or its file is not JSON.
    """
    for key in ("quantization_config", "compression_config"):
        section = reader.config.get(key)
        if section is not None and not isinstance(section, dict):
            raise BadInputError(f"{reader.path}: {key} is no mapping", "mend config.json")
        if section:
            return section
    for name, method in _OWN_FILES.items():
        if (reader.path / name).is_file():
            return {"quant_method": method, **read_json_object(reader.path / name)}
    return None
