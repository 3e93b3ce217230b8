"""What was typed, made into what is measured; all of it is checked before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt.bench.decode.engines import KV_KINDS, PEERS, WEIGHTS, check_choices, plan_entries
from llmopt.bench.decode.run import DecodeOptions
from llmopt.bench.grown_model import cached_grown_model
from llmopt.bench.growth import parse_count
from llmopt.bench.naming import known
from llmopt.checkpoint.artifact import check_output
from llmopt.demo.paths import demo_model_path
from llmopt.environment import check_device
from llmopt.errors import BadInputError
from llmopt.formats.gguf.mixtures import MIXTURES
from llmopt.progress import Progress, silent
from llmopt.recipe import load_recipe
from llmopt.stages import SchemeSection

DTYPES = ("bfloat16", "float16", "float32")
_PLAIN = "16-bit"


@dataclass(frozen=True, slots=True)
class DecodeChoices:
    """The command line's options; lists are comma-separated.

    Attributes:
        model: folder of a checkpoint; the demo model if none.
        grown: number of parameters to grow it to.
        batch: numbers of requests.
        context: tokens of a prompt.
        weights: of checkpoints.
        kv: caches.
        peer: names, or ``none``.
        gguf: kinds of files for llama.cpp.
        new_tokens: that each request wants.
        repeats: runs that count.
        threads: of every engine.
        dtype: of activations and 16-bit weights.
        device: ``cpu`` or ``cuda``.
        recipe: that gives the INT4 weights.
        timeout_s: after which an engine is ended.
    """

    model: Path | None = None
    grown: str | None = None
    batch: str = "1,4,16"
    context: str = "128,1024"
    weights: str = "16-bit,int4"
    kv: str = "16-bit,int8,int4"
    peer: str = "transformers,llama.cpp,vllm"
    gguf: str = "BF16,Q4_0,Q4_K_M"
    new_tokens: int = 64
    repeats: int = 3
    threads: int = 2
    dtype: str = "bfloat16"
    device: str = "cpu"
    recipe: str = "int4-rtn"
    timeout_s: float | None = None


def decode_options(
    choices: DecodeChoices, output: Path, progress: Progress = silent
) -> DecodeOptions:
    """What is to be measured; grows the model where that is asked.

    Raises:
        BadInputError: an unknown name (with the nearest one), a number that is none, a model that
            cannot be grown, or an output that is taken.
        StorageError: the disk is too small for the grown model.
    """
    check_output(output)
    batches, contexts = _numbers(choices.batch, "batch"), _numbers(choices.context, "context")
    check_device(choices.device)
    check_choices([choices.dtype], DTYPES, "element type")
    check_int4(choices.recipe)
    weights = check_choices(_plain_names(choices.weights), WEIGHTS, "kind of weights")
    kvs = check_choices(_plain_names(choices.kv), KV_KINDS, "kind of cache")
    named = [] if choices.peer.strip() in ("", "none") else _names(choices.peer)
    peers = check_choices(named, PEERS, "peer")
    gguf = [known(name, list(MIXTURES), "kind of GGUF file") for name in _names(choices.gguf)]
    # Everything is compared with the plain weights and the plain cache: they are always there.
    entries = plan_entries(_with_plain(weights), _with_plain(kvs), peers, gguf)
    model = choices.model or demo_model_path()
    if choices.grown is not None:
        # A power of two, so that the next run's model is the same one.
        positions = 1 << (max(contexts) + choices.new_tokens - 1).bit_length()
        model = cached_grown_model(model, parse_count(choices.grown), positions, progress)
    return DecodeOptions(
        model=model,
        output=output,
        entries=tuple(entries),
        batches=batches,
        contexts=contexts,
        new_tokens=choices.new_tokens,
        repeats=choices.repeats,
        threads=choices.threads,
        dtype=choices.dtype,
        device=choices.device,
        recipe=choices.recipe,
        timeout_s=choices.timeout_s,
    )


def check_int4(recipe: str) -> None:
    """Hold that a recipe gives a checkpoint with 4-bit weights, as its rows say.

    Raises:
        BadInputError: it does not, or cannot be read.
    """
    section = load_recipe(recipe).quantize.scheme
    if not isinstance(section, SchemeSection) or section.scheme().bits != 4:
        raise BadInputError(
            f"the recipe {recipe} does not give a checkpoint of 4-bit weights",
            "name one that does, such as int4-rtn or int4-gptq",
        )


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _plain_names(text: str) -> list[str]:
    return [_PLAIN if name in ("bf16", "16bit", "16") else name for name in _names(text)]


def _with_plain(names: Sequence[str]) -> list[str]:
    return [_PLAIN, *(name for name in names if name != _PLAIN)]


def _numbers(text: str, kind: str) -> tuple[int, ...]:
    """Ascending, each once.

    Raises:
        BadInputError: something that is no positive number, or nothing.
    """
    names = _names(text)
    if not names or not all(name.isdecimal() and int(name) for name in names):
        raise BadInputError(
            f"--{kind} {text!r} is no list of positive numbers", "write it as 1,4,16"
        )
    return tuple(sorted({int(name) for name in names}))
