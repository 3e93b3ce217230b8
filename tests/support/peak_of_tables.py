"""The peak of anonymous memory while a GGUF file's embedding is made ready to be judged.

    python -m support.peak_of_tables SOURCE FILE SCRATCH

FILE's embedding is spilled as the candidate's, SOURCE's rounded to Q6_K as the yardstick's, and the
values of both are digested as for the round trip. Prints resident anonymous bytes before, and their
peak during it.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path

import torch
from support.peak_memory import anonymous_bytes

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.formats.gguf.source import GGUFSource
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.tensor import digest_values
from llmopt.quantization.ggml.types import GGML_TYPES
from llmopt.rounded import RoundedSource
from llmopt.spilled import SpilledSource

TABLE = "model.embed_tokens.weight"


def main(source: Path, file: Path, scratch: Path) -> None:
    """Do the work and watch."""
    quantize_blocks(torch.randn(4, 256), GGML_TYPES["Q6_K"])  # what the first call loads
    peak = before = anonymous_bytes()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    candidate, reader = GGUFSource(file), open_checkpoint(source)
    spilled = SpilledSource(candidate, {TABLE: partial(candidate.read_rows, TABLE)}, scratch)
    rounded = RoundedSource(reader, {TABLE: GGML_TYPES["Q6_K"]})
    yardstick = SpilledSource(rounded, {TABLE: partial(rounded.read_rows, TABLE)}, scratch)
    digest_values([spilled.read(TABLE), yardstick.read(TABLE), reader.read(TABLE)])
    over.set()
    watcher.join()
    print(before, peak)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
