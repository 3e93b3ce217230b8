"""Greedy continuations of prompts by llama.cpp.

Run as ``python continue_with_llama_cpp.py REQUEST.json RESPONSE.json`` in an environment that has
llama-cpp-python. The request has ``model``, ``prompts`` (texts) and ``num_tokens``; the response
lists, for each prompt, the ids of ``prompt`` as llama.cpp tokenizes it and of ``answer``.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from llama_cpp import Llama

if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    llama = Llama(request["model"], n_ctx=512, n_threads=1, verbose=False)
    answers = []
    for text in request["prompts"]:
        prompt = llama.tokenize(text.encode(), special=True)
        generated = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answers.append({"prompt": prompt, "answer": list(islice(generated, request["num_tokens"]))})
        llama.reset()
    Path(sys.argv[2]).write_text(json.dumps(answers), "utf-8")
    llama.close()
