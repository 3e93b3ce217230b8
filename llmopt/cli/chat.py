"""``llmopt chat``: talk with a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import errors
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
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from llmopt.decoding.chat import Chat

HELP = "/new begins anew, /exit or Ctrl-D ends; Ctrl-C cuts an answer short"


def chat(
    model: ModelFolder,
    system: Annotated[str | None, typer.Option(help="The system's message.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    kv_cache: KVCache = "auto",
    max_context: MaxContext = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Talk with MODEL by its chat template; answers come as they are generated."""
    from llmopt.decoding import Engine
    from llmopt.decoding.chat import Chat

    engine = Engine(
        model,
        kv_cache=kv_cache,
        max_context=max_context,
        max_sequences=1,
        dtype=dtype,
        device=device,
    )
    talk = Chat(engine, system)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
    }
    errors.print(HELP, style="dim", markup=False, highlight=False)
    while (question := _read()) is not None:
        if question == "/new":
            talk.forget()
        elif question:
            _answer(talk, question, options)


def _read() -> str | None:
    """The next turn, without the space around it; ``None`` at the end."""
    try:
        question = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        write("\n")
        return None
    return None if question == "/exit" else question


def _answer(talk: Chat, question: str, options: Mapping[str, object]) -> None:
    pieces = talk.ask(question, **options)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        pass  # what was said so far stays said
    except BadInputError as error:  # the conversation may go on, or begin anew
        errors.print(f"{error.what}\n{error.remedy}", markup=False, highlight=False)
    finally:
        pieces.close()
        write("\n")
