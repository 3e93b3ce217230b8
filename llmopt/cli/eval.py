"""``llmopt eval``: the gate alone, on something already on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import output, progress_bars
from llmopt.errors import BadInputError


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Folder of the model to judge, or a GGUF file.")],
    against: Annotated[Path, typer.Option("--against", help="Folder of the model it came from.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Held-out text: builtin, a file or a data set's name.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Take criteria and text from this recipe.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    engine: Annotated[
        str | None, typer.Option(help="llama.cpp: let it compute a GGUF file, as it is served.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the verdict to this file.")
    ] = None,
) -> None:
    """Measure ARTIFACT against its source; exit 0 passed, 3 failed, 4 inconclusive."""
    from llmopt.evaluation import evaluate as run
    from llmopt.recipe import load_recipe

    if json_file is not None and not json_file.parent.is_dir():
        raise BadInputError(f"{json_file.parent} is not a directory", "make it, or name another")
    chosen = load_recipe(recipe) if recipe else None
    with progress_bars() as progress:
        result = run(
            artifact,
            against,
            recipe=chosen,
            text=text,
            device=device,
            engine=engine,
            progress=progress,
        )
    from llmopt.report.console import render_verdict

    output.print(render_verdict(result.verdict, result.notes))
    if json_file is not None:
        json_file.write_text(result.verdict.model_dump_json(indent=2), encoding="utf-8")
    raise typer.Exit(int(result.exit_code))
