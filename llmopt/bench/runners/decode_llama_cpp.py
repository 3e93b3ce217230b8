"""llama.cpp (https://github.com/ggml-org/llama.cpp) on a GGUF file, many sequences in one context.

Prompts are read one after the other in batches of 512 tokens; then a step decodes a token of every
sequence that is not done, as llama.cpp's own server and ``llama-batched-bench`` do.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

PACKAGES = ("llama_cpp_python",)
Answer = tuple[list[list[int]], list[list[float]]]

_BATCH = 512
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_KINDS = {"16-bit": 1, "int8": 8, "int4": 2}  # ggml's numbers of F16, Q8_0 and Q4_0


def open_engine(request: dict[str, Any]) -> LlamaCpp:
    """The file, mapped and read once."""
    llama_cpp.llama_log_set(_CALLBACK, ctypes.c_void_p(0))
    return LlamaCpp(request)


class LlamaCpp:
    """A model; every run has a context of its own, sized for it."""

    def __init__(self, request: dict[str, Any]) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 999 if request["device"].startswith("cuda") else 0
        self._model = llama_cpp.llama_model_load_from_file(request["model"].encode(), parameters)
        if self._model is None:
            raise RuntimeError(f"llama.cpp cannot load {request['model']}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._threads, self._kind = int(request["threads"]), _KINDS[request["kv"]]
        self.notes = [] if self._kind != 1 else ["cache in float16"]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Answer:
        """See ``decode_session``."""
        context = self._open_context(prompts, new_tokens)
        batch = llama_cpp.llama_batch_init(max(_BATCH, len(prompts)), 0, 1)
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        started = time.perf_counter()

        def decode(entries: Sequence[tuple[int, int, int, bool]]) -> None:
            """Entries are token, position, sequence and whether its logits are wanted."""
            batch.n_tokens = len(entries)
            for index, (token, position, sequence, wanted) in enumerate(entries):
                batch.token[index] = token
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = wanted
            status = llama_cpp.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode gave {status}")
            for index, (_, _, sequence, wanted) in enumerate(entries):
                if wanted:
                    found = llama_cpp.llama_get_logits_ith(context, index)
                    logits = np.ctypeslib.as_array(found, shape=(self._vocabulary,))
                    tokens[sequence].append(int(logits.argmax()))
                    times[sequence].append(time.perf_counter() - started)

        try:
            for sequence, prompt in enumerate(prompts):
                last = len(prompt) - 1
                for start in range(0, len(prompt), _BATCH):
                    part = range(start, min(start + _BATCH, len(prompt)))
                    decode([(prompt[i], i, sequence, i == last) for i in part])
            while entries := [
                (row[-1], len(prompts[sequence]) + len(row) - 1, sequence, True)
                for sequence, row in enumerate(tokens)
                if len(row) < new_tokens[sequence]
            ]:
                decode(entries)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
        return tokens, times

    def _open_context(
        self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]
    ) -> llama_cpp.llama_context_p:
        # A buffer a sequence: the default is one for all, in which each looks at all others' keys.
        longest = max(len(p) + n for p, n in zip(prompts, new_tokens, strict=True))
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = len(prompts)
        parameters.n_ctx = len(prompts) * (-(-longest // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = max(_BATCH, len(prompts))
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = self._kind
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        if self._kind != 1:  # a quantized cache of values needs it
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.kv_unified = False
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if context is None:
            raise RuntimeError("llama.cpp cannot make a context of this size")
        return context


def _warn(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


_CALLBACK = llama_cpp.llama_log_callback(_warn)  # must live as long as llama.cpp may log
