"""One decode engine in a process of its own, given workloads, telling when each token came.

``python decode_session.py MODULE REQUEST.json ANSWERS.jsonl``: ``MODULE`` lies beside this file and
has ``open_engine(request)``, which gives an object with ``run(prompts, new_tokens)``, and
``PACKAGES``, whose versions are told. ``run`` answers greedily, never stops early, and returns the
tokens of every request and the seconds after its start at which each of them was known. An engine
that can tells with ``gaps`` how far the best token led before the next, and with ``noise`` how far
another batch shape moves such a lead.

The first line of the answers is on the engine, then there is one for every workload, written as
soon as it is done, so that what was measured before a crash is kept. Fields are those of
``llmopt.bench.decode.measuring``. Imports the standard library alone before the engine.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

memory_bytes = importlib.import_module("session").memory_bytes  # lies beside this file

WARM_UP_TOKENS = 4


def main(module: str, request_file: str, answers_file: str) -> None:
    """Open the engine, run every workload, write down what it took."""
    request: dict[str, Any] = json.loads(Path(request_file).read_text("utf-8"))
    runner = importlib.import_module(module)
    if "torch" in sys.modules:  # it is where the runner has imported it
        sys.modules["torch"].set_num_threads(request["threads"])
    own = memory_bytes("VmRSS")
    started = time.perf_counter()
    engine = runner.open_engine(request)
    packages = (*runner.PACKAGES, *(("torch",) if "torch" in sys.modules else ()))
    header = {
        "load_s": time.perf_counter() - started,
        "own_rss_bytes": own,
        "versions": {name: version(name) for name in packages},
        "notes": list(getattr(engine, "notes", ())),
    }
    with Path(answers_file).open("w", encoding="utf-8") as answers:
        _write(answers, header)
        for workload in request["workloads"]:
            _write(answers, _answer(engine, workload, request["device"], request["vocabulary"]))


def _other_than(prompts: list[list[int]], run: int, vocabulary: int) -> list[list[int]]:
    """Prompts with another first token in every run: a cache of prefixes must not find them."""
    return [[(prompt[0] + run) % vocabulary, *prompt[1:]] for prompt in prompts]


def _answer(engine: Any, workload: dict[str, Any], device: str, vocabulary: int) -> dict[str, Any]:
    """Every run of a workload, after those that are not counted."""
    prompts, new_tokens = workload["prompts"], workload["new_tokens"]
    answer: dict[str, Any] = {"name": workload["name"], "times_s": []}
    try:
        # Clocks, allocators and compilers settle in a run that is not counted.
        for _ in range(workload["warm_ups"]):
            few = [min(number, WARM_UP_TOKENS) for number in new_tokens]
            engine.run(_other_than(prompts, -1, vocabulary), few)
        _forget_peak(device)
        for repeat in range(workload["repeats"]):
            asked = _other_than(prompts, repeat, vocabulary)
            tokens, times = engine.run(asked, new_tokens)
            answer["times_s"].append(times)
            answer.setdefault("tokens", tokens)
        answer["peak_bytes"] = _peak_bytes(device)
        if workload["wants_gaps"] and hasattr(engine, "gaps"):
            answer["gaps"] = engine.gaps(prompts, answer["tokens"])
            answer["noise"] = engine.noise(prompts, answer["tokens"])
    except Exception as error:  # whatever it raises is its answer; the next workload may go well
        traceback.print_exc()
        answer = {"name": workload["name"], "error": f"{type(error).__name__}: {error}"}
    return answer


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # VmHWM becomes VmRSS


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return int(memory_bytes("VmHWM"))


def _write(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
