"""The report of an artifact that could not be judged: what broke, of what, by what recipe.

It lies in the quarantine as ``failure.json``, with a model card that says the same to a reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import NonNegativeFloat

from llmopt.checkpoint.durable import write_bytes
from llmopt.report.schema import (
    CARD_NAME,
    Environment,
    FileHash,
    LayerRecord,
    RecipeRecord,
    Record,
    Source,
)

FAILURE_NAME: Final = "failure.json"


class Failure(Record):
    """What is known of an artifact that broke before it had a verdict.

    Attributes:
        stage: where: reading the bytes back, or the gate, whose model computed NaN or infinity.
        what: is wrong, naming the tensors or the layer.
        remedy: what to do about it.
    """

    schema_version: Literal[1] = 1
    llmopt_version: str
    created: str
    name: str
    stage: Literal["round trip", "gate"]
    what: str
    remedy: str
    source: Source
    recipe: RecipeRecord
    environment: Environment
    layers: tuple[LayerRecord, ...]
    timings: dict[str, NonNegativeFloat]
    files: dict[str, FileHash]


def write_failure(directory: Path, failure: Failure) -> None:
    """Write the failure as JSON and as a model card.

    Raises:
        StorageError: if the disk refuses.
    """
    card = (
        f"# {failure.name}: refused\n\n"
        f"llmopt {failure.llmopt_version} made this of {failure.source.name} by the recipe "
        f"{failure.recipe.name}. It broke at the {failure.stage} and must not be used.\n\n"
        f"    {failure.what}\n\n"
        f"What to do: {failure.remedy}. `{FAILURE_NAME}` has the details.\n"
    )
    write_bytes(directory / CARD_NAME, card.encode())
    write_bytes(directory / FAILURE_NAME, (failure.model_dump_json(indent=1) + "\n").encode())
