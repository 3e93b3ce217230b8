"""Decodes every packed weight of model directories with AutoAWQ's own decoder.

Run as ``python decode_with_autoawq.py REQUEST.json`` in an environment that has it. The request
maps each model directory to the safetensors file that takes its weights, ``(out, in)`` in the
element type of the scales.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from torch import Tensor


def decode(directory: Path) -> dict[str, Tensor]:
    """Every packed weight of a directory, by its module's name."""
    config = json.loads((directory / "config.json").read_text("utf-8"))["quantization_config"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    weights = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            qweight, qzeros, scales = (tensors[f"{module}.{p}"] for p in (part, "qzeros", "scales"))
            size = config["group_size"] if config["group_size"] > 0 else qweight.shape[0]
            decoded = dequantize_gemm(qweight, qzeros, scales, config["bits"], size)
            weights[module] = decoded.t().contiguous()
    return weights


if __name__ == "__main__":
    for directory, file in json.loads(Path(sys.argv[1]).read_text("utf-8")).items():
        save_file(decode(Path(directory)), file)
