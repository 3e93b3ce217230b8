"""``llmopt quantize``: the road from a checkpoint to a gated artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import errors, output, progress_bars
from llmopt.errors import ExitCode


def quantize(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or YAML file.")],
    destination: Annotated[
        Path, typer.Option("--output", "-o", help="Folder, or .gguf file, to publish.")
    ],
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dry_run: Annotated[bool, typer.Option(help="Check the contract and stop.")] = False,
    text: Annotated[
        str | None, typer.Option(help="Calibration text, instead of the recipe's source.")
    ] = None,
) -> None:
    """Quantize SOURCE by a recipe, measure what was written, publish it if it passed."""
    from llmopt import pipeline
    from llmopt.checkpoint.artifact import has_interrupted_run
    from llmopt.recipe import load_recipe

    chosen = load_recipe(recipe)
    if text is not None:
        calibration = chosen.calibration.model_copy(update={"source": text})
        chosen = chosen.model_copy(update={"calibration": calibration})
    if dry_run:
        from llmopt.job import check
        from llmopt.report.console import render_contract

        contract = check(source, chosen, destination, device=device)
        output.print(render_contract(contract))
        raise typer.Exit(int(ExitCode.BAD_INPUT if contract.refusals else ExitCode.PASS))
    if resume and not has_interrupted_run(destination):
        errors.print(f"nothing to resume for {destination}: beginning anew", markup=False)
    try:
        with progress_bars() as progress:
            result = pipeline.quantize(
                source, chosen, destination, resume=resume, device=device, progress=progress
            )
    except KeyboardInterrupt as interrupt:
        errors.print("interrupted; the same command with --resume goes on from here")
        raise typer.Exit(130) from interrupt
    from llmopt.report.console import render_summary

    output.print(render_summary(result.report, result.path))
    raise typer.Exit(int(result.exit_code))
