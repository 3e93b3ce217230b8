"""``llmopt imatrix``: an importance matrix as llama.cpp's tools read and write them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import errors, output, progress_bars


def imatrix(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    destination: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Take the calibration text from this recipe.")
    ] = "gguf-q4_k_m",
    text: Annotated[
        str | None, typer.Option(help="Calibration text, instead of the recipe's source.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Gather how much each input channel of SOURCE matters, as llama-imatrix does."""
    from llmopt.imatrix import gather_imatrix
    from llmopt.recipe import load_recipe

    chosen = load_recipe(recipe)
    if text is not None:
        calibration = chosen.calibration.model_copy(update={"source": text})
        chosen = chosen.model_copy(update={"calibration": calibration})
    with progress_bars() as progress:
        found = gather_imatrix(source, destination, recipe=chosen, device=device, progress=progress)
    for name, experts in found.starved.items():
        errors.print(f"{name}: {experts} experts saw no token", markup=False, highlight=False)
    line = f"{found.num_entries} weights over {found.num_tokens:,} tokens: {found.path}"
    output.print(line, markup=False, highlight=False, soft_wrap=True)
