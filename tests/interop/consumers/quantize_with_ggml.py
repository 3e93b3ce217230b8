"""Quantizes and dequantizes rows with ggml itself, through the library in llama-cpp-python.

Run as ``python quantize_with_ggml.py REQUEST.json`` in an environment that has it. The request is a
list of jobs over ``.npy`` files::

    {"do": "quantize", "type": 12, "row_bytes": 144, "in": FLOATS, "importance": FLOATS or null,
     "out": BYTES}
    {"do": "dequantize", "name": "Q4_K", "columns": 256, "in": BYTES, "out": FLOATS}
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np


def library() -> ctypes.CDLL:
    """ggml's base library, without starting llama.cpp."""
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    (file,) = (Path(spec.origin).parent / "lib").glob("libggml-base.so")
    return ctypes.CDLL(str(file))


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def quantize(ggml: ctypes.CDLL, job: dict[str, Any]) -> np.ndarray:
    weight = np.ascontiguousarray(np.load(job["in"]), np.float32)
    importance = None
    if job["importance"] is not None:
        importance = np.ascontiguousarray(np.load(job["importance"]), np.float32)
    rows, columns = weight.shape
    data = np.zeros((rows, job["row_bytes"]), np.uint8)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = ggml.ggml_quantize_chunk(
        ctypes.c_int(job["type"]),
        pointer(weight),
        pointer(data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        pointer(importance),
    )
    assert written == data.nbytes, (job, written)
    return data


def dequantize(ggml: ctypes.CDLL, job: dict[str, Any]) -> np.ndarray:
    data = np.ascontiguousarray(np.load(job["in"]), np.uint8)
    values = np.zeros((len(data), job["columns"]), np.float32)
    name = job["name"].lower().replace("_k", "_K")
    function = getattr(ggml, f"dequantize_row_{name}")
    function.restype = None
    function(pointer(data), pointer(values), ctypes.c_int64(values.size))
    return values


def main(request: Path) -> None:
    """Do all jobs of a request."""
    ggml = library()
    for job in json.loads(request.read_text("utf-8")):
        np.save(job["out"], {"quantize": quantize, "dequantize": dequantize}[job["do"]](ggml, job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
