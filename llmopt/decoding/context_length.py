"""How many tokens of prompt and answer an engine takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmopt.errors import BadInputError


def choose_context(asked: int | None, config: Any) -> int:
    """What the user asked for, or else what the model was made for.

    Args:
        asked: by the user.
        config: of the text model.

    Raises:
        BadInputError: more than the model was made for, or neither number is known; or the model's
            rotary frequencies would go by a request's neighbours.
    """
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    if asked is None and made_for is None:
        raise BadInputError(
            "the model's config does not say how long a context it was made for",
            "give max_context",
        )
    if asked is not None and made_for is not None and asked > made_for:
        raise BadInputError(
            f"max_context {asked} is more than the {made_for} tokens that the model was made for",
            f"give at most {made_for}",
        )
    context = made_for if asked is None else asked
    assert context is not None
    for original in _lengths_of_short_factors(config):
        if context > original:
            raise BadInputError(
                f"a context of {context} tokens; this model has other rotary factors (longrope) "
                f"for sequences of more than {original}, and transformers chooses them by the "
                "longest of all that are computed together, so that answers would depend on their "
                "neighbours",
                f"give max_context={original}: up to there the factors are the same for all",
            )
    return context


def _lengths_of_short_factors(config: Any) -> Iterator[int]:
    """Of each longrope among the rotary parameters, which are one set or one a type of layer."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(one for one in parameters.values() if isinstance(one, Mapping))]
    for one in sets:
        if one.get("rope_type") == "longrope":
            yield one["original_max_position_embeddings"]
