"""One quantization by one quantizer in a process of its own, timed from within.

``python session.py MODULE REQUEST.json RESPONSE.json``: ``MODULE`` lies beside this file, imports a
quantizer and has ``quantize(request) -> dict``, which may give ``quantize_s``, ``phases_s`` and
``notes``, and ``PACKAGES``, whose versions are told. The fields of request and response are those
of ``llmopt.bench.measuring``. Imports the standard library alone before the quantizer.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def memory_bytes(field: str) -> int:
    """A line of ``/proc/self/status`` such as ``VmHWM``, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(module: str, request_file: str, response_file: str) -> None:
    """Import the quantizer, run it once, write down what it took."""
    request: dict[str, Any] = json.loads(Path(request_file).read_text("utf-8"))
    started = time.monotonic()
    quantizer = importlib.import_module(module)
    has_torch = find_spec("torch") is not None  # llama.cpp's environment has none
    if has_torch:
        import torch

        torch.set_num_threads(request["threads"])
    response: dict[str, Any] = {
        "import_s": time.monotonic() - started,
        "own_rss_bytes": memory_bytes("VmRSS"),
        "own_anonymous_bytes": memory_bytes("RssAnon"),
    }
    response |= quantizer.quantize(request)
    # The high-water mark of this process image; rusage would tell the parent's at the fork too.
    response["peak_rss_bytes"] = memory_bytes("VmHWM")
    packages = (*quantizer.PACKAGES, *(("torch",) if has_torch else ()))
    response["versions"] = {name: version(name) for name in packages}
    Path(response_file).write_text(json.dumps(response), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
