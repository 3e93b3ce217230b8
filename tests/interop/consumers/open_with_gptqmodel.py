"""Opens model directories with GPTQModel and says what they answer.

Run as ``python open_with_gptqmodel.py REQUEST.json RESPONSE.json`` in an environment that has it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# Read when gptqmodel and torch are imported: a pool of it wants two workers and gets half of the
# cores, and its layers have torch compile what they run, once for each of our tiny models.
os.environ.update(GPTQMODEL_CPU_WORKERS="2", TORCHDYNAMO_DISABLE="1")

import torch  # noqa: E402
from answering import answer, is_quantized, serve  # noqa: E402
from gptqmodel import GPTQModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """What a directory answers; one that is not quantized is opened with transformers."""
    dtype = getattr(torch, job["dtype"])
    if not is_quantized(job["directory"]):
        return answer(AutoModelForCausalLM.from_pretrained(job["directory"], dtype=dtype), job)
    return answer(GPTQModel.load(job["directory"], device="cpu", dtype=dtype).model, job)


if __name__ == "__main__":
    serve(examine, *sys.argv[1:])
