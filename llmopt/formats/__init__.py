"""Quantized tensors to bytes on disk and back; what each consumer of those bytes accepts."""

from llmopt.formats.base import Format
from llmopt.formats.compressed_tensors import CompressedTensors

FORMATS: dict[str, Format] = {"compressed-tensors": CompressedTensors()}
"""Every format by the name that recipes use."""
