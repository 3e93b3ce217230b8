"""Options that ``generate`` and ``chat`` share, and text on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[
    Path, typer.Argument(help="Folder of a Hugging Face checkpoint, or of what llmopt quantized.")
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.", min=1)]
Temperature = Annotated[
    float | None, typer.Option(help="0: the most probable token; 1: as the model would draw.")
]
TopP = Annotated[float | None, typer.Option(help="Draw among the tokens that hold this share.")]
TopK = Annotated[int | None, typer.Option(help="Draw among so many tokens.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw tokens this probable beside the most probable.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: shun tokens that were there already.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="End at this text; may be given again.")]
KVCache = Annotated[
    str, typer.Option(help="How keys and values are kept: auto, bf16, fp16, fp32, fp8, int8, int4.")
]
MaxContext = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer; the model's own if not given.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's if not given.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def write(text: str) -> None:
    """Show a piece of text at once; on a terminal without the characters that would steer it."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c.isprintable() or c in "\n\t")
    typer.echo(text, nl=False)
    sys.stdout.flush()
