"""Second readers of every format, which share no code with the packers.

They parse safetensors bytes and unpack bits with numpy alone, so that an error in a packer cannot
hide in its own inverse. Written from the descriptions of the formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from llmopt.formats.independent.awq import AWQDecoder
from llmopt.formats.independent.compressed_tensors import CompressedTensorsDecoder
from llmopt.formats.independent.gptq import GPTQDecoder
from llmopt.formats.independent.shards import DecodedWeight, RawShards, broken
from llmopt.quantization.scheme import Scheme

__all__ = ["DecodedWeight", "Decoder", "RawShards", "find_decoder"]


class Decoder(Protocol):
    """Reads the packed weights of one format."""

    def packed_modules(self, shards: RawShards) -> tuple[str, ...]:
        """The linear layers with a packed weight, in file order."""
        ...

    def decode(self, shards: RawShards, module: str, scheme: Scheme) -> DecodedWeight:
        """The packed weight of one linear layer, which should be of ``scheme``.

        Raises:
            RoundTripError: if a part is missing, contradicts the scheme, or should not be there.
        """
        ...


def find_decoder(config: Mapping[str, object]) -> Decoder:
    """The decoder of what a ``quantization_config`` declares.

    Raises:
        RoundTripError: if it declares nothing that llmopt writes.
    """
    match config:
        case {"quant_method": "compressed-tensors", "format": "pack-quantized"}:
            return CompressedTensorsDecoder()
        case {"quant_method": "gptq", "checkpoint_format": "gptq"}:
            return GPTQDecoder(stored_less=1)
        case {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}:
            return GPTQDecoder(stored_less=0)
        case {"quant_method": "awq", "version": "gemm"}:
            return AWQDecoder()
    raise broken(f"quantization_config declares {config.get('quant_method')!r}, unknown here")
