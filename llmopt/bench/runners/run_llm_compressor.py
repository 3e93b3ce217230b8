"""llm-compressor (https://github.com/vllm-project/llm-compressor), with its own defaults."""

from __future__ import annotations

import time
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers")
MODIFIERS = {"gptq": GPTQModifier, "awq": AWQModifier}


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize every linear layer but the head, and save in ``pack-quantized``."""
    notes = []
    if request["method"] == "awq":
        # It pins its cache's memory even where there is no accelerator to pin it for.
        IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
        notes.append("IntermediatesCache.pin_memory made a no-op: it needs an accelerator")
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    rows = request["token_ids"]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    weights = QuantizationArgs(
        num_bits=request["bits"],
        type="int",
        strategy="group",
        group_size=request["group_size"],
        symmetric=request["symmetric"],
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = MODIFIERS[request["method"]](config_groups={"group_0": scheme}, ignore=["lm_head"])
    started = time.monotonic()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=dataset,
        recipe=[modifier],
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
    )
    model.save_pretrained(request["output"], save_compressed=True)
    seconds = time.monotonic() - started
    tokenizer.save_pretrained(request["output"])
    return {"quantize_s": seconds, "notes": notes}
