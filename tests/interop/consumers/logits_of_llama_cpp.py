"""Logits of GGUF files in llama.cpp, as exact as it computes: cache in float32, no flash attention.

Run as ``python logits_of_llama_cpp.py REQUEST.json`` in an environment that has llama-cpp-python.
The request is a list of ``model``, ``tokens`` and ``logits``, the .npy file that takes them,
``(tokens, vocabulary) float32``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

CONTEXT = 256
F32 = 0  # ggml's number
ERROR = 4  # GGML_LOG_LEVEL_ERROR


def compute(model_path: str, tokens: Sequence[int]) -> np.ndarray:
    """All positions' logits, ``(tokens, vocabulary)``."""
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), model_parameters)
    if model is None:
        raise RuntimeError(f"llama.cpp cannot load {model_path}")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index] = token
        batch.pos[index] = index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = 1
    status = llama_cpp.llama_decode(context, batch)
    if status:
        raise RuntimeError(f"llama_decode gave {status} for {model_path}")
    found = llama_cpp.llama_get_logits(context)
    logits = np.ctypeslib.as_array(found, shape=(len(tokens), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


@llama_cpp.llama_log_callback
def tell_errors(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Passes on what llama.cpp says of errors."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    llama_cpp.llama_log_set(tell_errors, ctypes.c_void_p(0))
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        np.save(job["logits"], compute(job["model"], job["tokens"]))
