"""``llmopt generate``: continue prompts with a model."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from llmopt.cli.console import output
from llmopt.cli.decoding_options import (
    Device,
    Dtype,
    KVCache,
    MaxContext,
    MaxNewTokens,
    MinP,
    ModelFolder,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    write,
)


def generate(
    model: ModelFolder,
    prompts: Annotated[list[str], typer.Argument(help="Texts to go on from; - reads one.")],
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of a sequence.")
    ] = False,
    n: Annotated[int, typer.Option("-n", help="Answers to each prompt.", min=1)] = 1,
    kv_cache: KVCache = "auto",
    max_context: MaxContext = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line: tokens, log-probabilities, ...")
    ] = False,
) -> None:
    """Write on from PROMPTS: one as it comes, several together when all are done."""
    from llmopt.decoding import Engine

    engine = Engine(model, kv_cache=kv_cache, max_context=max_context, dtype=dtype, device=device)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "n": n,
    }
    if len(texts) == 1 and n == 1 and not as_json:
        for delta in engine.iterate(texts[0], **options):
            write(delta.text)
        write("\n")
        return
    for index, answer in enumerate(engine.generate(texts, **options)):
        if as_json:
            fields = {"prompt": texts[index // n], **dataclasses.asdict(answer)}
            typer.echo(json.dumps(fields, ensure_ascii=False))
        else:
            output.rule(f"prompt {index // n + 1}, answer {index % n + 1}", align="left")
            write(f"{answer.text}\n")
