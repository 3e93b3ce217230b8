"""llama.cpp's quantizer (https://github.com/ggml-org/llama.cpp) by way of llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGUFReader

PACKAGES = ("llama_cpp_python", "gguf")


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize one file by ``llama_model_quantize``, its only way."""
    keep_quiet()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = request["file_type"]
    parameters.nthread = request["threads"]
    parameters.pure = request["pure"]
    started = time.monotonic()
    importance = read_importance(request["imatrix"])
    # The last entry, all zeros, ends the list.
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    kind = ctypes.POINTER(llama_cpp.llama_model_imatrix_data)
    parameters.imatrix = ctypes.cast(entries, kind)
    status = llama_cpp.llama_model_quantize(
        request["source"].encode(), request["output"].encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize gave {status}")
    return {"quantize_s": time.monotonic() - started}


def read_importance(path: str) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Mean squares by weight, experts one after the other, ones where none was seen."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    found = {}
    for name in (key.removesuffix(".in_sum2") for key in tensors if key.endswith(".in_sum2")):
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].reshape(-1, 1)
        means = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1)
        found[name] = np.ascontiguousarray(means.reshape(-1), dtype=np.float32)
    return found


def keep_quiet() -> None:
    """Let errors into the log alone; there is a line for every tensor otherwise."""
    llama_cpp.llama_log_set(_CALLBACK, ctypes.c_void_p(0))


def _warn(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_CALLBACK = llama_cpp.llama_log_callback(_warn)  # must live as long as llama.cpp may log
