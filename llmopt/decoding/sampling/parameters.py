"""What a caller may ask of a generation, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from llmopt.errors import BadInputError

SMALLEST_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature leave float32; what is meant is 0."""

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How one request is continued.

    The distribution that is drawn from comes about in transformers' order: repetition penalty,
    temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: how many tokens at most; ``None``: what is left of the context, at most 256.
        temperature: divides the logits; 0 takes the most probable token and draws nothing.
        top_k: keep the k most probable tokens and what is exactly as probable as the last of them.
        top_p: keep a token while those strictly more probable hold less than this share (nucleus
            sampling, arXiv:1904.09751).
        min_p: keep tokens at least this probable relative to the most probable one
            (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of every token that
            stands in the prompt or was generated (CTRL, arXiv:1909.05858).
        seed: of the request's random numbers, which nothing else influences; ``None`` takes a
            fresh one.
        stop: texts that end the generation; the first that completes counts, and is not returned.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: how many of the most probable tokens to report beside each generated one.
        n: completions of each prompt, each with random numbers of its own.

    Raises:
        BadInputError: a value out of its range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, lowest in (("max_new_tokens", 1), ("top_k", 1), ("logprobs", 0), ("seed", 0)):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), lowest)
        _check_integer("n", self.n, 1)
        if self.seed is not None and self.seed > LARGEST_SEED:
            raise BadInputError(f"seed {self.seed} has more than 64 bits", "give a smaller one")
        _check_number("temperature", self.temperature, 0, math.inf)
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise BadInputError(
                f"temperature {self.temperature} is too small to compute with",
                "give 0: the most probable token, nothing drawn",
            )
        _check_number("top_p", self.top_p, 0, 1, above=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True)
        _check_flag("ignore_eos", self.ignore_eos)
        _check_texts("stop", self.stop)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken and nothing is drawn."""
        return self.temperature == 0

    @property
    def restricted(self) -> bool:
        """Whether top-k, top-p or min-p take tokens out of the draw."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


def parse_options(options: Mapping[str, Any]) -> SamplingParameters:
    """Parameters from keyword arguments; ``stop`` may be one text, ``None`` is "not given".

    Raises:
        BadInputError: an unknown option, a value out of range, or a filter without a temperature,
            which would change nothing.
    """
    known = [field.name for field in fields(SamplingParameters)]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise BadInputError(f"unknown option {name!r}", hint)
    given = {name: value for name, value in options.items() if value is not None}
    filters = [name for name in ("top_k", "top_p", "min_p") if name in given]
    if filters and "temperature" not in given:
        raise BadInputError(
            f"{filters[0]} is given without a temperature: the most probable token would be "
            "taken whatever it says",
            "give temperature=1.0 to draw tokens, or temperature=0 where that is meant",
        )
    stop = given.get("stop", ())
    if isinstance(stop, str):
        given["stop"] = (stop,)
    elif isinstance(stop, list):
        given["stop"] = tuple(stop)
    return SamplingParameters(**given)


def _check_integer(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise BadInputError(
            f"{name} is {value!r}", f"give a whole number from {lowest} up, or leave it out"
        )


def _check_number(
    name: str, value: object, lowest: float, highest: float, *, above: bool = False
) -> None:
    inside = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, int | float):
        inside = inside and math.isfinite(value) and lowest <= value <= highest
        inside = inside and not (above and value == lowest)
    if not inside:
        least = f"above {lowest}" if above else f"from {lowest} up"
        most = f", at most {highest}" if math.isfinite(highest) else ""
        raise BadInputError(f"{name} is {value!r}", f"give a number {least}{most}, or leave it out")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise BadInputError(f"{name} is {value!r}", "give True or False")


def _check_texts(name: str, value: object) -> None:
    texts = value if isinstance(value, tuple) else ("",)
    if not all(isinstance(text, str) and text for text in texts):
        raise BadInputError(f"{name} is {value!r}", "give texts, none of them empty")
