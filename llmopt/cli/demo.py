"""``llmopt demo``: the main job on the small model that ships with llmopt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import output, progress_bars

PROMPT = "Return a new list containing"


def demo(
    destination: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to publish into.")
    ] = Path("demo-output"),
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or file.")] = (
        "int4-gptq"
    ),
) -> None:
    """Quantize the built-in model, gate it, and write text with what was published."""
    from llmopt import pipeline
    from llmopt.checkpoint.placement import report_folder
    from llmopt.demo.paths import demo_model_path
    from llmopt.recipe import load_recipe
    from llmopt.report.console import render_summary
    from llmopt.report.schema import HTML_NAME

    with progress_bars() as progress:
        result = pipeline.quantize(
            demo_model_path(), load_recipe(recipe), destination, resume=True, progress=progress
        )
    output.print(render_summary(result.report, result.path))
    if result.published and result.path.is_dir():  # a GGUF file is llama.cpp's to run
        from llmopt.demo.generation import continue_text

        output.print("\n[bold]The published model goes on writing:[/]")
        output.print(continue_text(result.path, PROMPT), markup=False, highlight=False)
    page = report_folder(result.path) / HTML_NAME
    output.print(f"\nOpen [bold]{page}[/] in a browser for the whole story.")
    raise typer.Exit(int(result.exit_code))
