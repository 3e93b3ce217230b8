"""Opens model directories with auto-gptq and says what they answer.

Run as ``python open_with_auto_gptq.py REQUEST.json RESPONSE.json`` in an environment that has it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from answering import answer, is_quantized, serve
from auto_gptq import AutoGPTQForCausalLM
from transformers import AutoModelForCausalLM


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """What a directory answers; one that is not quantized is opened with transformers."""
    dtype = getattr(torch, job["dtype"])
    if not is_quantized(job["directory"]):
        model = AutoModelForCausalLM.from_pretrained(job["directory"], torch_dtype=dtype)
        return answer(model, job)
    model = AutoGPTQForCausalLM.from_quantized(
        job["directory"],
        device="cpu",
        torch_dtype=dtype,
        use_safetensors=True,
        # All of them are for GPUs.
        use_triton=False,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        use_marlin=False,
        disable_exllama=True,
        disable_exllamav2=True,
    )
    return answer(model, job)


if __name__ == "__main__":
    serve(examine, *sys.argv[1:])
