"""Opens model directories with transformers and says what they answer.

Run as ``python open_with_transformers.py REQUEST.json RESPONSE.json [--dequantize]`` in any
environment that has transformers, and what it needs for the format.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

# Read when torch is imported: GPTQModel's layers, which open GPTQ and AWQ here, have torch compile
# what they run, once for each of our tiny models.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch  # noqa: E402
from answering import answer, is_quantized, serve  # noqa: E402
from transformers import AutoModelForCausalLM, CompressedTensorsConfig  # noqa: E402


def examine(job: dict[str, Any], dequantize: bool) -> dict[str, Any]:
    """What a directory answers.

    With ``dequantize`` a quantized checkpoint is opened as its user can ask transformers to.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, job["dtype"])}
    if dequantize and is_quantized(job["directory"]):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return answer(AutoModelForCausalLM.from_pretrained(job["directory"], **options), job)


if __name__ == "__main__":
    request, response, *flags = sys.argv[1:]
    serve(partial(examine, dequantize="--dequantize" in flags), request, response)
