"""What holds for the layers that any ``quantization_config`` names, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmopt.errors import BadInputError
from llmopt.quantization.scheme import Scheme


def check_layers(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> None:
    """Hold that a config has something to say, and says one thing of each layer.

    Raises:
        BadInputError: if no layer is quantized, or one is quantized and ignored.
    """
    if not schemes:
        raise BadInputError(
            "no linear layer would be quantized", "let the ignore list leave something"
        )
    if both := sorted(schemes.keys() & set(ignored)):
        raise BadInputError(f"{both[0]} is both quantized and ignored", "name it in one place only")
