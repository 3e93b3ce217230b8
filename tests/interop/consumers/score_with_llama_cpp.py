"""Scores passages with llmopt's own scorer over llama.cpp, both in one process.

Run by llmopt's interpreter as ``python score_with_llama_cpp.py SITE REQUEST.pt RESPONSE.pt``; SITE
is the folder of packages that has llama-cpp-python. The request holds ``file``, ``exact``,
``plain`` (token ids, each ``(T,) int64``) and ``branches`` (pairs of a context and continuations);
the response ``logits`` and ``logprobs`` of each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(sys.argv[1])  # behind our own packages, of which there are other versions there

import torch  # noqa: E402

from llmopt.serving.llama_cpp_scorer import llama_cpp_scorer  # noqa: E402
from llmopt_evals.scorer import Branches, Passage  # noqa: E402

STEP = 100  # rows asked for at a time

if __name__ == "__main__":
    request = torch.load(sys.argv[2])
    passages: list[Passage] = [*request["plain"], *(Branches(*b) for b in request["branches"])]
    num_plain = len(request["plain"])
    with llama_cpp_scorer(Path(request["file"]), threads=1, exact=request["exact"]) as scorer:
        scores = scorer.score(passages)
        logits = [
            torch.cat(
                [
                    scores.logits(index, start, min(start + STEP, len(tokens)))
                    for start in range(0, len(tokens), STEP)
                ]
            )
            for index, tokens in enumerate(request["plain"])
        ]
        logprobs = scores.branch_logprobs(range(num_plain, len(passages)))
    torch.save({"logits": logits, "logprobs": logprobs}, sys.argv[3])
