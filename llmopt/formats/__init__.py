"""Quantized tensors to bytes on disk and back; what each consumer of those bytes accepts."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from llmopt.errors import BadInputError
from llmopt.formats.awq import AWQ
from llmopt.formats.base import Format
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.formats.gptq import GPTQ
from llmopt.formats.gptq_config import CHECKPOINT_FORMATS, read_checkpoint_format

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQ(),
    "awq": AWQ(),
}
"""Every format by the name that recipes use, in its usual variant."""


def choose_format(name: str, checkpoint_format: str | None = None) -> Format:
    """A format by name, and by variant where there are several.

    Raises:
        BadInputError: an unknown format, or a variant that it does not have.
    """
    if name not in FORMATS:
        raise BadInputError(f"unknown format {name!r}", f"choose one of {', '.join(FORMATS)}")
    if checkpoint_format is None:
        return FORMATS[name]
    for known in CHECKPOINT_FORMATS if name == "gptq" else ():
        if checkpoint_format == known:
            return GPTQ(known)
    variants = " or ".join(CHECKPOINT_FORMATS) if name == "gptq" else "none"
    raise BadInputError(
        f"format {name} has no checkpoint_format {checkpoint_format!r}",
        f"its variants: {variants}",
    )


def read_format(config: Mapping[str, JsonValue]) -> Format:
    """The format, and its variant, that a ``quantization_config`` speaks of.

    Raises:
        BadInputError: one that llmopt does not read.
    """
    method = config.get("quant_method")
    name = method.lower() if isinstance(method, str) else ""
    if name not in FORMATS:
        raise BadInputError(
            f"quantization method {method!r} is not one llmopt reads",
            f"llmopt reads {', '.join(FORMATS)}",
        )
    return GPTQ(read_checkpoint_format(config)) if name == "gptq" else FORMATS[name]
