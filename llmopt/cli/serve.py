"""``llmopt serve``: an OpenAI-compatible server on a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import errors

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context_of_call: typer.Context,
    model: Annotated[Path, typer.Argument(help="A .gguf file.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads that compute; as many as physical cores.", min=1),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of context; the model's own, up to 8192, if not given.", min=1),
    ] = None,
    despite_verdict: Annotated[
        bool, typer.Option("--despite-verdict", help="Serve a file that the gate did not pass.")
    ] = False,
) -> None:
    """Serve MODEL with llama.cpp; options unknown here go to llama-cpp-python's server as they are.

    For example: llmopt serve model.gguf --context 4096 -- --api_key SECRET --n_gpu_layers -1
    """
    from llmopt.serving.llama_cpp import ServerOptions, plan_server, run_server

    options = ServerOptions(
        host, port, threads, context, despite_verdict, tuple(context_of_call.args)
    )
    plan = plan_server(model, options)
    for note in plan.notes:
        errors.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    run_server(plan)
