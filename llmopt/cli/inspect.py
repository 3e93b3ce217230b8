"""``llmopt inspect``: what a checkpoint, an artifact or a single file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import output


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A model folder, a .safetensors file or a GGUF file.")
    ],
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = False,
) -> None:
    """Show architecture, schemes, sizes and the verdict of what stands at PATH."""
    from llmopt.inspection import inspect_path
    from llmopt.report.console import render_inspection

    output.print(render_inspection(inspect_path(path), list_tensors=tensors))
