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
    from llmopt.demo.paths import demo_model_path
    from llmopt.recipe import load_recipe
    from llmopt.report.console import render_summary

    with progress_bars() as progress:
        result = pipeline.quantize(
            demo_model_path(), load_recipe(recipe), destination, resume=True, progress=progress
        )
    output.print(render_summary(result.report, result.path))
    if result.published:
        from llmopt.demo.generation import continue_text

        output.print("\n[bold]The published model goes on writing:[/]")
        output.print(continue_text(result.path, PROMPT), markup=False, highlight=False)
    output.print(f"\nOpen [bold]{result.path / 'report.html'}[/] in a browser for the whole story.")
    raise typer.Exit(int(result.exit_code))
