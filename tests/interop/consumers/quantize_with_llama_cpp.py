"""Quantizes GGUF files with llama.cpp's own tool.

Run as ``python quantize_with_llama_cpp.py REQUEST.json`` in an environment that has
llama-cpp-python. The request is a list of ``source``, ``target``, ``file_type`` and ``importance``,
which maps names to their number of values (all of them one); null for no importance matrix.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp


def quantize(job: dict[str, Any]) -> None:
    """Run one job; raises where llama.cpp refuses."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = job["file_type"]
    parameters.nthread = 1
    if job["importance"] is not None:
        rows = [
            (name.encode(), (ctypes.c_float * count)(*[1.0] * count), count)
            for name, count in job["importance"].items()
        ]
        # The last entry, all zeros, ends the list.
        entries = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for entry, (name, values, count) in zip(entries, rows, strict=False):
            entry.name = name
            entry.data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
            entry.size = count
        kind = ctypes.POINTER(llama_cpp.llama_model_imatrix_data)
        parameters.imatrix = ctypes.cast(entries, kind)
    status = llama_cpp.llama_model_quantize(
        job["source"].encode(), job["target"].encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize gave {status} for {job}")


@llama_cpp.llama_log_callback
def be_quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Takes llama.cpp's log; thousands of lines say nothing here."""


if __name__ == "__main__":
    llama_cpp.llama_log_set(be_quiet, ctypes.c_void_p(0))
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        quantize(job)
