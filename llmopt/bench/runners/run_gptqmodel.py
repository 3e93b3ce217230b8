"""GPTQModel (https://github.com/ModelCloud/GPTQModel), with its own defaults."""

from __future__ import annotations

import time
from typing import Any

from gptqmodel import GPTQModel, QuantizeConfig

PACKAGES = ("gptqmodel", "transformers")


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize every linear layer but the head, and save as a GPTQ file."""
    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request["symmetric"],
        device="cpu",
    )
    model = GPTQModel.load(request["model"], config)
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in request["token_ids"]]
    started = time.monotonic()
    model.quantize(samples)
    model.save(request["output"])
    return {"quantize_s": time.monotonic() - started}
