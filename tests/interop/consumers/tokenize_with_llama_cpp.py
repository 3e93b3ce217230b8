"""Tokenizes texts with llama.cpp.

Run as ``python tokenize_with_llama_cpp.py REQUEST.json RESPONSE.json`` in an environment that has
llama-cpp-python. The request lists jobs; each gives a GGUF ``file``, of which only the vocabulary
is read, and ``texts``. The response gives for each job ``bare``: the ids of each text, special
tokens in it recognised; ``dressed``: the same with what llama.cpp puts around a text; ``ends``: the
tokens at which it stops.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp


def examine(file: str, texts: list[str]) -> dict[str, Any]:
    """Tokenize every text with a file's vocabulary."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
    if not model:
        raise SystemExit(f"llama.cpp did not load {file}")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocabulary)
    answer = {
        "bare": [tokenize(vocabulary, text, add_special=False) for text in texts],
        "dressed": [tokenize(vocabulary, text, add_special=True) for text in texts],
        "ends": [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocabulary, i)],
    }
    llama_cpp.llama_model_free(model)
    return answer


def tokenize(vocabulary: Any, text: str, *, add_special: bool) -> list[int]:
    """Token ids of a text; a character map can make several of one byte."""
    data = text.encode()
    buffer = (ctypes.c_int32 * (32 * len(data) + 8))()
    count = llama_cpp.llama_tokenize(
        vocabulary, data, len(data), buffer, len(buffer), add_special, True
    )
    assert count >= 0, "the buffer is too small"
    return list(buffer[:count])


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answers = [examine(job["file"], job["texts"]) for job in jobs]
    Path(sys.argv[2]).write_text(json.dumps(answers), "utf-8")
