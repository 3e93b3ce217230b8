"""``llmopt convert``: another file format for the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import output, progress_bars


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a quantized model, from any tool.")],
    to: Annotated[str, typer.Option("--to", help="gptq, awq or compressed-tensors.")],
    destination: Annotated[Path, typer.Option("--output", "-o", help="Folder to publish into.")],
    checkpoint_format: Annotated[
        str | None, typer.Option(help="Of gptq: gptq (zero points less one) or gptq_v2.")
    ] = None,
    consumer: Annotated[
        list[str] | None, typer.Option(help="Who must open it; without a word all that can.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks of the consumers.")] = 1,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check that it can be done exactly.")] = False,
) -> None:
    """Write SOURCE in another format without quantizing anew, exact or not at all."""
    from llmopt.conversion import plan_conversion
    from llmopt.converting import convert as run

    consumers = tuple(consumer or ())
    with progress_bars() as progress:
        if dry_run:
            plan = plan_conversion(
                source,
                to,
                checkpoint_format=checkpoint_format,
                consumers=consumers,
                tensor_parallel_size=tensor_parallel_size,
                progress=progress,
            )
            names = ", ".join(held.name for held in plan.consumers)
            line = f"{len(plan.schemes)} weights would be exact; opened by {names}"
        else:
            result = run(
                source,
                to,
                destination,
                checkpoint_format=checkpoint_format,
                consumers=consumers,
                tensor_parallel_size=tensor_parallel_size,
                resume=resume,
                progress=progress,
            )
            line = f"every tensor equals the source's: {result.path}"
    output.print(line, markup=False, highlight=False, soft_wrap=True)
