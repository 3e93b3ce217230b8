"""An F32 file computes in llama.cpp what the checkpoint computes in transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop.protocol import CONSUMERS_FOLDER
from support import gguf_models, tiny_models
from support.gguf_models import open_and_plan, write_plain
from transformers.activations import GELUTanh

from llmopt.bench.environments import clean_variables
from llmopt.formats.gguf.values import TypedValue, boolean, int32s, string, strings

NO_WINDOW: dict[str, Any] = {"sliding_window": None}
FULL = gguf_models.CONFIGS
WHOLE = 40  # tokens: five windows
WINDOW = gguf_models.WINDOW

# A value that float32 rounds otherwise may be another entry of ggml's table of GELU.
GELU = 4e-3

# What a case is called -> its config, its number of tokens, the largest difference of a logit.
CASES: Mapping[str, tuple[Callable[[], Any], int, float]] = {
    "llama": (FULL["llama"], WHOLE, 1e-4),
    "llama, linear, tied": (FULL["llama_linear_tied"], WHOLE, 1e-4),
    "llama3, biased": (FULL["llama3_biased"], WHOLE, 1e-4),
    "llama, longrope": (
        lambda: tiny_models.llama_config(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 3.0, 5.0],
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            max_position_embeddings=1024,
        ),
        WHOLE,
        1e-4,
    ),
    "llama, wide heads": (lambda: tiny_models.llama_config(head_dim=16), WHOLE, 1e-4),
    "mistral": (lambda: tiny_models.mistral_config(**NO_WINDOW), WHOLE, 1e-4),
    "mistral, in its window": (FULL["mistral"], WINDOW, 1e-4),
    "mixtral": (lambda: tiny_models.mixtral_config(**NO_WINDOW), WHOLE, 1e-4),
    "qwen2": (lambda: tiny_models.qwen2_config(use_sliding_window=False), WHOLE, 1e-4),
    "qwen2, in its window": (FULL["qwen2"], WINDOW, 1e-4),
    "qwen3": (FULL["qwen3"], WHOLE, 1e-4),
    "qwen3, yarn": (FULL["qwen3_yarn"], WHOLE, 1e-4),
    "qwen3_moe": (FULL["qwen3_moe"], WHOLE, 1e-4),
    "gemma2": (FULL["gemma2"], WHOLE, GELU),
    "gemma2, linear": (
        lambda: gguf_models.gemma2_config(
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        ),
        WHOLE,
        GELU,
    ),
    "gemma2, no windows": (
        lambda: gguf_models.gemma2_config(layer_types=["full_attention"] * 3),
        WHOLE,
        GELU,
    ),
    "gemma2, in its windows": (
        lambda: gguf_models.gemma2_config(layer_types=["sliding_attention"] * 3),
        WINDOW,
        GELU,
    ),
    "gemma3": (FULL["gemma3"], WHOLE, GELU),
    "gemma3, no windows": (
        lambda: gguf_models.gemma3_config(layer_types=["full_attention"] * 3),
        WHOLE,
        GELU,
    ),
    "gemma3, multimodal": (FULL["gemma3_multimodal"], WHOLE, GELU),
    "phi3": (lambda: tiny_models.phi3_config(**NO_WINDOW), WHOLE, 1e-4),
    # llama.cpp chooses by its context, 256 here, transformers by the text.
    "phi3, short factors": (
        lambda: gguf_models.longrope_config(
            max_position_embeddings=512, original_max_position_embeddings=256
        ),
        WHOLE,
        1e-4,
    ),
    "phi3, long factors": (FULL["phi3_longrope"], 160, 1e-4),
    "olmo2": (FULL["olmo2"], WHOLE, 1e-4),
    "olmo2, tied": (lambda: tiny_models.olmo2_config(tie_word_embeddings=True), WHOLE, 1e-4),
    "smollm3": (FULL["smollm3"], WHOLE, 1e-4),
}


def tokenizer() -> dict[str, TypedValue]:
    """A vocabulary of nothing in particular: only ids are asked."""
    tokens = [f"t{index}" for index in range(tiny_models.VOCABULARY)]
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("gpt-2"),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": int32s([1] * len(tokens)),
        "tokenizer.ggml.merges": strings(["t 0"]),
        "tokenizer.ggml.add_bos_token": boolean(False),
    }


def gelu_of_ggml(values: torch.Tensor) -> torch.Tensor:
    """GELU as ggml computes it on a CPU: a table in half precision between -10 and 10."""
    rounded = values.half().float()
    table = torch.nn.functional.gelu(rounded, approximate="tanh").half().float()
    return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, table))


def measure(python: Path, name: str, folder: Path) -> tuple[float, float]:
    """The largest difference of a logit, and the logits' standard deviation."""
    config, length, _ = CASES[name]
    model = tiny_models.write_checkpoint(folder / "source", config(), seed=5)
    reader, plan = open_and_plan(folder / "source")
    write_plain(folder / "m.gguf", reader, plan, tokenizer())
    tokens = (torch.arange(1, length + 1) * 37 % (tiny_models.VOCABULARY - 4)).tolist()
    job = {"model": str(folder / "m.gguf"), "tokens": tokens, "logits": str(folder / "l.npy")}
    (folder / "request.json").write_text(json.dumps([job]), "utf-8")
    done = subprocess.run(
        [
            str(python),
            str(CONSUMERS_FOLDER / "logits_of_llama_cpp.py"),
            str(folder / "request.json"),
        ],
        cwd=folder,
        env=clean_variables(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for module in model.modules():
        if isinstance(module, GELUTanh):
            module.forward = gelu_of_ggml
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([tokens])).logits[0]
    found = torch.from_numpy(np.load(folder / "l.npy"))
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max()), float(wanted.std())


@pytest.mark.interop
@pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(python: Path, name: str, tmp_path: Path) -> None:
    difference, spread = measure(python, name, tmp_path)
    assert spread > 0.1
    assert difference < CASES[name][2]
