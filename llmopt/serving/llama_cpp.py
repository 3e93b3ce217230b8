"""Starts llama-cpp-python's OpenAI-compatible server (``python -m llama_cpp.server``) on a file."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from llmopt.errors import BadInputError
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.record import has_intact_tensors, read_verdict
from llmopt.serving.processors import physical_cores

DEFAULT_CONTEXT = 8192
"""Tokens of context where none are asked for: more cost memory that most conversations never use.
"""
SERVER_PACKAGES = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context",
                   "pydantic_settings")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the server is asked to be.

    Attributes:
        host: address that it listens at.
        port: likewise.
        threads: that compute; the physical cores without a number.
        context: tokens of prompt and answer together; from the file without a number.
        despite_verdict: serve a file that the gate refused, or has not judged.
        further: options of llama-cpp-python's server, passed on as they are.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    context: int | None = None
    despite_verdict: bool = False
    further: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What will be run.

    Attributes:
        arguments: of the Python interpreter.
        notes: what a person should know before it starts.
    """

    arguments: tuple[str, ...]
    notes: tuple[str, ...]


def plan_server(path: Path, options: ServerOptions) -> ServerPlan:
    """Check a file and choose how to serve it.

    Args:
        path: a ``.gguf`` file.
        options: what was asked for.

    Raises:
        BadInputError: no such file, a damaged one, one that holds no language model, or one that
            the gate refused.
    """
    if path.is_dir():
        raise BadInputError(
            f"{path} is a folder; llama.cpp serves single .gguf files",
            "name the file in it, or serve a folder of safetensors with vLLM",
        )
    file = GGUFFile(path)
    notes = _verdict_notes(file, options.despite_verdict)
    context, said = _context(file, options.context)
    names_format = any(word.split("=")[0] == "--chat_format" for word in options.further)
    if "tokenizer.chat_template" not in file.metadata and not names_format:
        notes += (
            "the file has no chat template, so chat requests would be written as Llama 2 wants "
            "them; use plain completions, or pass -- --chat_format NAME",
        )
    threads = physical_cores() if options.threads is None else options.threads
    settings = {
        "model": str(path.resolve()),
        "model_alias": path.stem,
        "host": options.host,
        "port": options.port,
        "n_ctx": context,
        "n_threads": threads,
        "n_threads_batch": threads,
        # The server would keep logits of every position of the context: gigabytes, for nothing
        # but a request's logprobs of its prompt.
        "logits_all": False,
        "verbose": False,
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    # A later option overrules an earlier one of the same name.
    arguments = ("-m", "llama_cpp.server", *given, *options.further)
    return ServerPlan(arguments, (*notes, *said))


def run_server(plan: ServerPlan) -> NoReturn:
    """Become the server: what stops this process (a signal, a container's end) stops it.

    Raises:
        BadInputError: llama-cpp-python or what its server needs is not installed.
    """
    check_installed(SERVER_PACKAGES)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *plan.arguments])


def check_installed(packages: Sequence[str]) -> None:
    """Refuse where a package is missing.

    Raises:
        BadInputError: says which, and how to get it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInputError(
            f"llama.cpp's server cannot be started: {', '.join(missing)} is not installed",
            "pip install 'llama-cpp-python[server]' into the environment of llmopt",
        )


def _verdict_notes(file: GGUFFile, despite_verdict: bool) -> tuple[str, ...]:
    verdict = read_verdict(file)
    if verdict is None:
        return ("the file has no verdict of llmopt: nobody measured it against its source here",)
    outcome = verdict.get("outcome", "none yet")
    if outcome == "pass":
        # A tool that quantizes the file again carries the verdict along with the other metadata.
        if has_intact_tensors(file.path):
            return ()
        outcome = "pass, of other tensors than it holds now"
    if not despite_verdict:
        raise BadInputError(
            f"the gate's verdict on {file.path} is: {outcome}",
            "quantize the source again, or with a milder recipe; to serve it nonetheless, pass "
            "--despite-verdict",
        )
    return (f"served despite the gate's verdict: {outcome}",)


def _context(file: GGUFFile, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    """Tokens of context, and what is to be said of the choice."""
    architecture = file.metadata.get("general.architecture")
    trained = file.metadata.get(f"{architecture}.context_length")
    if not isinstance(architecture, str) or not isinstance(trained, int):
        raise BadInputError(
            f"{file.path} does not say which language model it holds "
            "(general.architecture, its context_length)",
            "give a file with a whole language model",
        )
    if wanted is not None:
        longer = f"the model was made for {trained} tokens of context; {wanted} were asked for"
        return wanted, (longer,) if wanted > trained else ()
    if trained <= DEFAULT_CONTEXT:
        return trained, ()
    cache = cache_bytes(file, architecture, DEFAULT_CONTEXT)
    size = "" if cache is None else f" (a cache of {cache / 2**20:.0f} MiB)"
    return DEFAULT_CONTEXT, (
        f"serving {DEFAULT_CONTEXT} tokens of context{size} of the {trained} that the model was "
        f"made for; --context {trained} serves all",
    )


def cache_bytes(file: GGUFFile, architecture: str, context: int) -> int | None:
    """Bytes of keys and values in 16 bits for a context, where the file tells enough.

    A layer that looks back over a window only is counted as if it looked back over everything.
    """

    def number(name: str) -> int | None:
        value = file.metadata.get(f"{architecture}.{name}")
        return value if isinstance(value, int) else None

    layers, heads = number("block_count"), number("attention.head_count")
    width = number("embedding_length")
    per_layer = file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    if layers is None or width is None or not heads:
        return None
    if isinstance(per_layer, int):
        kv_heads = per_layer * layers
    elif isinstance(per_layer, np.ndarray):
        kv_heads = int(per_layer.sum())
    else:
        return None
    key = number("attention.key_length") or width // heads
    value = number("attention.value_length") or width // heads
    return kv_heads * (key + value) * context * 2
