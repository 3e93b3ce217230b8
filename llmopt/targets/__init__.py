"""What is made of a checkpoint, and how: see :mod:`llmopt.targets.base`."""

from __future__ import annotations

from llmopt.checkpoint.placement import FOLDER, SINGLE_FILE, Placement
from llmopt.checkpoint.reader import CheckpointReader
from llmopt.checkpoint.structure import ModelStructure
from llmopt.recipe import Recipe
from llmopt.targets.base import Target
from llmopt.targets.checkpoint import CheckpointTarget
from llmopt.targets.gguf.target import GGUFTarget


def choose_placement(recipe: Recipe) -> Placement:
    """What the output of a recipe will be."""
    return SINGLE_FILE if recipe.quantize.is_ggml else FOLDER


def choose_target(
    reader: CheckpointReader, structure: ModelStructure, recipe: Recipe, device: str
) -> Target:
    """The output that a recipe asks for, its contract drawn but not enforced.

    Raises:
        ContractError: a format, type or consumer that llmopt does not know, a pattern that matches
            nothing.
    """
    if recipe.quantize.is_ggml:
        return GGUFTarget(reader, structure, recipe, device)
    return CheckpointTarget(reader, structure, recipe, device)
