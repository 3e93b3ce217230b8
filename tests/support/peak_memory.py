"""The peak of anonymous memory of one job in a fresh process, as a script.

    python -m support.peak_memory SOURCE TEXT OUTPUT

Prints two numbers of bytes: resident anonymous pages before the job, and their peak during it.
Pages of mapped files are not counted: the system takes those back when it needs them.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401  (imported before the measurement)
from support.small_jobs import small_recipe

import llmopt.pipeline


def anonymous_bytes() -> int:
    """Resident anonymous pages of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def main(source: Path, text: Path, output: Path) -> None:
    """Run the job and watch."""
    peak = before = anonymous_bytes()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    llmopt.pipeline.quantize(source, small_recipe(text), output)
    over.set()
    watcher.join()
    print(before, peak)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
