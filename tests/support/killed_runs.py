"""Runs of one job, each killed without warning at a random moment and resumed, as a script.

    python -m support.killed_runs SOURCE TEXT FOLDER KILLS

It imports everything once and forks a child a run, before any thread has been started, so that a
run costs what it computes. Prints the hash of every shard of an undisturbed run and of each
resumed one, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401  (imported once, before the forks)
from support.small_jobs import small_recipe

import llmopt.pipeline
from llmopt.errors import AlreadyConcludedError

SLOWEST_SECONDS = 300


def fork_run(source: Path, text: Path, output: Path) -> int:
    """Start a run that resumes if there is something to resume; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        llmopt.pipeline.quantize(source, small_recipe(text), output, resume=True)
        status = 0
    except AlreadyConcludedError as error:
        status = int(error.exit_code)
    finally:
        os._exit(status)


def run_to_the_end(source: Path, text: Path, output: Path) -> float:
    """Run undisturbed; returns the seconds it took."""
    start = time.monotonic()
    _, status = os.waitpid(fork_run(source, text, output), 0)
    if status:
        raise SystemExit(f"an undisturbed run for {output} ended with {status}")
    return time.monotonic() - start


def kill(source: Path, text: Path, output: Path, seconds: float) -> bool:
    """Kill a run after ``seconds``; false if it had come to its end before."""
    child = fork_run(source, text, output)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def kill_and_resume(source: Path, text: Path, output: Path, seconds: float) -> str:
    """Kill a run after ``seconds`` (earlier where it was faster), look what is visible, resume."""
    while not kill(source, text, output, seconds):
        shutil.rmtree(output)
        seconds *= 0.9
    if not output.exists():
        visible = "nothing"
    else:  # the kill came after the rename: what is visible must be whole
        visible = "whole" if (output / "llmopt.json").is_file() else "half"
    run_to_the_end(source, text, output)
    return visible


def shard_hashes(output: Path) -> dict[str, str]:
    """File name -> SHA-256 of each shard and of the config and index."""
    names = [*output.glob("*.safetensors"), output / "config.json", *output.glob("*.index.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(names)}


def main(source: Path, text: Path, folder: Path, kills: int) -> None:
    """Run once undisturbed, then ``kills`` times with a kill."""
    whole = folder / "whole"
    seconds = run_to_the_end(source, text, whole)
    generator = random.Random(0)
    resumed = []
    for number in range(kills):
        output = folder / f"killed-{number}"
        # Moments spread over the whole run, one drawn from each equal part of it.
        moment = seconds * (number + generator.random()) / kills
        visible = kill_and_resume(source, text, output, moment)
        resumed.append({"visible": visible, "shards": shard_hashes(output)})
    print(json.dumps({"whole": shard_hashes(whole), "resumed": resumed}))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), kills=int(sys.argv[4]))
